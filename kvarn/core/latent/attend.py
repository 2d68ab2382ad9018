"""Attend: absorbed queries over latent records, exact tail, sinks and the step's own rows, in one softmax."""

import functools
from typing import Any, NamedTuple

import torch

from kvarn.core.attend import sm_count, task_block
from kvarn.core.cache import CacheConfig, LayerCache, runs_triton
from kvarn.core.chunk_step import chunk_task_shape
from kvarn.core.combine import combine, merged_sooner
from kvarn.core.explicit import is_hopper
from kvarn.core.hadamard import rotate
from kvarn.core.latent.append import rotate_queries
from kvarn.core.latent.layout import LatentLayout, latent_constants
from kvarn.core.latent.reference import decode_latents
from kvarn.core.launch import chained, has_lop3, launch
from kvarn.core.readable import readable_rows
from kvarn.core.reference import softmax_attention
from kvarn.core.step import Step, record_end, task_shape
from kvarn.core.work import RAW_BLOCK, most_shares, units_per_share

# Query columns of a program; those of one of two warp groups.
LATENT_COLUMNS = 16
_GROUP_COLUMNS = 64
# What the kernel with explicit layouts serves: blocks of so many words and rope channels.
_BLOCK = 64
# Two programs of four warps, or one of two groups of four, fill a multiprocessor's registers.
_WARPS, _PROGRAMS_PER_SM = 4, 2
# Tasks and blocks of heads up to which one does: what fewer programs leave is merged sooner. It takes so much shared
# memory that a second one has no room.
_FEW_TASKS = 2
_ROOM_KIB = 114
# Tokens of a record that the Triton kernel restores at a time, and its stages, of which the page table takes one.
_TOKENS, _STAGES = 32, 3


class LatentShape(NamedTuple):
    """How queries over latents share programs: arguments of the functions that make steps.

    Args:
        group: query heads that share the restoring of a record.
        widest: query columns of a program.
    """

    group: int
    widest: int


def latent_shape(layout: LatentLayout, q_heads: int, device: torch.device) -> LatentShape:
    """Return it for query heads of a layer on this rank."""
    widest = _GROUP_COLUMNS if has_latent_groups(layout, device) else LATENT_COLUMNS
    return LatentShape(_heads_together(q_heads, widest), widest)


@functools.cache
def _heads_together(q_heads: int, widest: int) -> int:
    return max(heads for heads in range(1, min(q_heads, widest) + 1) if q_heads % heads == 0)


def has_latent_groups(layout: LatentLayout, device: torch.device) -> bool:
    """Return whether Hopper's warp groups serve more than LATENT_COLUMNS (`kernels.gluon.latent_groups`).

    They serve tiles of 128 tokens and latents of 512 channels in 4 bits.
    """
    fields = layout.latent_fields
    served = layout.tile_tokens == 128 and fields[0].words == 128 and fields[0].bits == 4
    return served and has_explicit_latents(layout, device) and is_hopper(device)


def _program_columns(columns: int) -> int:
    """Return the query columns of programs that are to serve so many."""
    return LATENT_COLUMNS if columns <= LATENT_COLUMNS else _GROUP_COLUMNS


def has_explicit_latents(layout: LatentLayout, device: torch.device) -> bool:
    """Return whether the kernel with explicit layouts (`kernels.gluon.latent`) serves a layout on a device.

    It needs an NVIDIA GPU, and latents and rope parts of whole blocks of 64.
    """
    if not has_lop3(device):
        return False
    fields = layout.latent_fields
    return len(fields) == 1 and fields[0].words % _BLOCK == 0 and layout.rope_dim == _BLOCK


def num_latent_programs(
    config: CacheConfig[LatentLayout],
    head_blocks: int,
    columns: int,
    tasks: int,
    pages: int,
    rows_in_ring: bool,
    device: torch.device,
) -> int:
    """Return how many programs share the work of one block of heads. It follows from shapes alone."""
    programs = _most_programs(config, head_blocks, columns, tasks, pages, rows_in_ring, device)
    return merged_sooner(programs, tasks, config)


def _most_programs(
    config: CacheConfig[LatentLayout], head_blocks: int, columns: int, tasks: int, pages: int, rows_in_ring: bool,
    device: torch.device,
) -> int:  # fmt: skip
    if config.batch_invariant:
        return most_shares(config, tasks, pages, rows_in_ring=rows_in_ring)
    one = columns > LATENT_COLUMNS or _are_few(config, tasks, head_blocks)
    return max(1, sm_count(device) * (1 if one else _PROGRAMS_PER_SM) // head_blocks)


def _are_few(config: CacheConfig[LatentLayout], tasks: int, head_blocks: int) -> bool:
    return tasks * head_blocks <= _FEW_TASKS and not config.batch_invariant


def most_latent_partial_bytes(
    config: CacheConfig[LatentLayout], tokens: int, requests: int, pages: int, heads: int, device: torch.device
) -> int:
    """Return the bytes of the most partial results that any step leaves before it merges them.

    Args:
        config: shared numbers.
        tokens: most rows of a step that are attended to with absorbed queries.
        requests: most requests of a step.
        pages: most pages of a request.
        heads: query heads of a layer on this rank.
        device: where the step runs.
    """
    group, widest = latent_shape(config.layout, heads, device)
    rows_per_task, columns = chunk_task_shape(config, group, widest)
    kinds = [(_program_columns(columns), tokens // rows_per_task + requests, False)]
    for rows_each in range(1, config.draft_tokens + 2):
        rows_per_task, columns = task_shape(config, group, rows_each, widest)
        kinds.append((_program_columns(columns), requests * -(-rows_each // rows_per_task), True))
    blocks, rows = heads // group, []
    for columns, tasks, rows_in_ring in kinds:
        programs = _most_programs(config, blocks, columns, tasks, pages, rows_in_ring, device)
        rows.append((programs + tasks) * blocks * columns)
    return max(rows) * (config.layout.latent_dim + 1) * torch.float32.itemsize


def attend_latents(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    raw: torch.Tensor,
    layer: LayerCache[LatentLayout],
    step: Step,
    scale: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend every query row of a step to what the read rule lets it see (`step.record_end`).

    Args:
        q_latent: [tokens, heads, latent_dim], model dtype: queries with the keys' up-projection absorbed, not rotated;
            token and head strides are free.
        q_rope: [tokens, heads, rope_dim], model dtype.
        raw: the step's rows, `rotate_latents`.
        layer: the layer's cache, sealed for this step.
        step: the forward pass, made for `latent_shape(layout, heads, device)`.
        scale: factor on q . k.
        out: [tokens, heads, latent_dim], model dtype, contiguous: where to write the output; made here if None.

    Returns:
        Output [tokens, heads, latent_dim], model dtype: mixed latents, un-rotated, for the values' up-projection; and
        natural log-sum-exp [tokens, heads], float32.

    Determinism: bitwise for equal inputs, lengths and batch shape; with `CacheConfig.batch_invariant` a row's bits
    depend on that row's request alone. Graph-safe: yes.
    """
    if not runs_triton(layer.records):
        result, lse = attend_latents_reference(q_latent, q_rope, raw, layer, step, scale)
        return (result.to(layer.tails.dtype) if out is None else out.copy_(result)), lse
    config, layout, device = layer.config, layer.config.layout, q_latent.device
    heads = q_latent.shape[1]
    if out is None:
        out = torch.empty(q_latent.shape, dtype=layer.tails.dtype, device=device)
    q, unit = rotate_queries(q_latent, q_rope, layout)
    group, tasks = latent_shape(layout, heads, device).group, step.task_request.shape[0]
    columns = _program_columns(step.columns)
    kernel, options = _attend_kernel(layout, columns, _are_few(config, tasks, heads // group), device)
    pages = step.block_table.shape[1]
    programs = num_latent_programs(config, heads // group, columns, tasks, pages, step.rows_in_ring, device)
    parts = (programs + tasks, heads // group, columns)
    partial_out = torch.empty(*parts, layout.latent_dim, dtype=torch.float32, device=device)
    partial_lse = torch.empty(parts, dtype=torch.float32, device=device)
    launch(
        kernel, (programs, heads // group),
        q, unit, layer.records, layer.tails, layer.sinks, raw, step.task_request, step.task_row, step.work_end,
        step.rows, step.prefix_lens, step.seq_lens, step.own_start, step.sink_slots, step.query_start,
        step.block_table, partial_out, partial_lse, scale, tasks, heads, *layer.records.stride()[:2],
        layer.tails.stride(0), layer.sinks.stride(0), raw.stride(0), step.block_table.stride(0),
        **latent_constants(layout), GROUP=group, ROWS=step.rows_per_task, COLUMNS=columns,
        RING=config.ring_tokens, TILES=config.tiles_per_block, TAIL=config.tail_tokens, SINK=config.sink_tokens,
        ROWS_IN_RING=step.rows_in_ring, CANONICAL=config.canonical, RAW_BLOCK=RAW_BLOCK, TASK_BLOCK=task_block(tasks),
        SHARE=units_per_share(config, rows_in_ring=step.rows_in_ring), **options, **chained(device),
        num_warps=_WARPS,
    )  # fmt: skip
    return out, combine(partial_out, partial_lse, layer, step, out)


def _attend_kernel(layout: LatentLayout, columns: int, few: bool, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """Return the kernel for a layout, query columns, and few tasks or many, and the constants that it alone takes."""
    if columns > LATENT_COLUMNS:
        from kvarn.core.kernels.gluon.latent_groups import attend_latents_by_groups_kernel

        return attend_latents_by_groups_kernel, {}
    if has_explicit_latents(layout, device):
        from kvarn.core.kernels.gluon.latent import attend_latents_kernel as explicit_kernel

        return explicit_kernel, {"ROOM": _ROOM_KIB if few else 0}
    from kvarn.core.kernels.latent.attend import attend_latents_kernel

    return attend_latents_kernel, {"TOKENS": _TOKENS, "STAGES": _STAGES, "USE_ASM": has_lop3(device)}


def attend_latents_reference(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    raw: torch.Tensor,
    layer: LayerCache[LatentLayout],
    step: Step,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend in plain torch, request by request, in float32 (in float64 if queries come in that, for an oracle)."""
    config, layout = layer.config, layer.config.layout
    rotated_q = rotate(q_latent)
    q = torch.cat((rotated_q, q_rope.to(rotated_q.dtype)), dim=-1)
    outs, lses = [], []
    starts = step.query_start.tolist()
    for request, (begin, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        if begin >= q.shape[0]:
            break
        position = step.token_position[begin:end]
        end_of_records = record_end(config, step, torch.full_like(position, request, dtype=torch.int64), position)
        decode = functools.partial(_decode, layout=layout)
        found = readable_rows(raw[:, None], layer, step, request, end_of_records, decode)
        visible = found.visible(config, end_of_records, position, int(step.sink_slots[request]))
        rows = found.rows[:, 0].to(q.dtype)  # [positions, 1, row_dim]
        out, lse = softmax_attention(q[begin:end], rows, rows, visible, scale)
        outs.append(rotate(out[..., : layout.latent_dim], inverse=True))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def _decode(records: torch.Tensor, layout: LatentLayout) -> torch.Tensor:
    """Restore records to raw rows, [tiles, 1, 1, tile_tokens, row_dim]."""
    return torch.cat(decode_latents(records, layout), dim=-1)[:, :, None]
