"""Attend: queries over records, exact tail, sinks and the step's own rows, in one softmax."""

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kvarn.core import explicit
from kvarn.core.append import RotatedRows
from kvarn.core.cache import CacheConfig, LayerCache, layout_constants, runs_triton
from kvarn.core.chunk_step import chunk_task_shape
from kvarn.core.combine import combine, merged_sooner
from kvarn.core.explicit import DECODE_COLUMNS, SHARED_COLUMNS, VERIFY_COLUMNS
from kvarn.core.hadamard import rotate, rotate_keys
from kvarn.core.launch import Constants, chained, has_lop3, launch
from kvarn.core.layout import TileLayout
from kvarn.core.readable import readable_rows
from kvarn.core.reference import decode_record, softmax_attention
from kvarn.core.step import Step, record_end, task_shape
from kvarn.core.work import RAW_BLOCK, TASK_BLOCK, most_shares, units_per_share

# Registers of a thread that let six programs of two warps run, and output elements of a program up to which so many
# hold them and a tile's, of keys of fewer bits.
NARROW_REGISTERS = 168
_ACCUMULATORS = 1024
_MOST_BITS = 8
# Of a Hopper multiprocessor; and what each program takes beside its buffers, reductions and the driver's part.
_SHARED_BYTES = 228 << 10
_SHARED_OVERHEAD = 3 << 10
_TASK_BLOCKS = (32, 128)
# Programs a multiprocessor of narrow columns; and how many do, where no more than so many tasks and kv heads are read:
# what fewer programs leave is merged sooner, and their records still come as fast as from all.
_NARROW_PROGRAMS = 6
_ENOUGH_PROGRAMS = ((4, 2), (16, 4))


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """How the attention kernel is launched. `python -m benchmarks.kernels tune` measures which is fastest.

    Args:
        warps: of a program.
        stages: of the pipeline that loads tiles: buffers with explicit layouts, else Triton's stages, of which the page
            table takes one and computing another.
        programs_per_sm: programs a multiprocessor, those of all kv heads together.
        registers: the most of a thread, None for no limit.
        room_kib: shared memory that a program takes at least, so that no more than its share fit a multiprocessor: a
            GPU doesn't spread programs evenly that leave it room.
    """

    warps: int
    stages: int
    programs_per_sm: int = 8
    registers: int | None = None
    room_kib: int = 0


# Of warps that share tiles, with 32 and with 16 columns. Three programs of 168 registers take 3 to 10 % longer with 32
# columns than two of 250, though these have fewer warps: less of a tile is under way in them.
_SHARED_TILES, _NARROW_SHARED_TILES = LaunchShape(4, 1, 2), LaunchShape(4, 1, 3, NARROW_REGISTERS)


def shared_bytes(layout: TileLayout, columns: int) -> int:
    """Return the most shared memory that a program with explicit layouts takes: a record or raw rows, and queries."""
    tile = layout.record_bytes + 2 * columns * layout.tile_tokens
    raw = 2 * RAW_BLOCK * layout.head_dim * 2
    return max(tile, raw) + 2 * 2 * columns * layout.head_dim + _SHARED_OVERHEAD


def launch_shape(config: CacheConfig, columns: int, rows: int, tasks: int, device: torch.device) -> LaunchShape:
    """Return the shape for so many attention tasks of a step, and the query columns and rows of each.

    With explicit layouts two warps and 168 registers let a multiprocessor run six programs, wide ones and those over
    keys of 8 bits four, as far as its shared memory holds them: what doesn't run at once would run alone. Four warps
    share tiles where tasks have several rows.

    Without, four warps and 16 columns make Triton 3.6 choose the MMAs of a warp group, whose results here are wrong on
    an H100 (NaN, then an illegal memory access), so wide columns get two warps, though a tile of wide heads then
    spills.
    """
    layout, head_dim = config.layout, config.layout.head_dim
    if explicit.shares_tiles(layout, columns, rows, device):
        return _SHARED_TILES if columns == SHARED_COLUMNS else _NARROW_SHARED_TILES
    if explicit.has_explicit_layouts(layout, device):
        narrow = head_dim <= 128 and head_dim * columns <= _ACCUMULATORS and layout.key_bits < _MOST_BITS
        fitting = _SHARED_BYTES // shared_bytes(layout, columns)
        if not narrow:
            return LaunchShape(2, 1, min(4, fitting))
        enough = next((n for most, n in _ENOUGH_PROGRAMS if tasks * config.kv_heads <= most), None)
        if enough is None or columns > DECODE_COLUMNS or config.batch_invariant:
            return LaunchShape(2, 1, min(_NARROW_PROGRAMS, fitting), NARROW_REGISTERS)
        return LaunchShape(2, 1, enough, NARROW_REGISTERS, (_SHARED_BYTES >> 10) // (enough + 1))
    if columns <= DECODE_COLUMNS:
        return LaunchShape(2, 5, 4) if head_dim <= 128 else LaunchShape(4 if head_dim <= 256 else 8, 2)
    return LaunchShape(2, 2)


def num_programs(
    config: CacheConfig, shape: LaunchShape, tasks: int, pages: int, rows_in_ring: bool, device: torch.device
) -> int:
    """Return how many programs share the work of one kv head. It follows from shapes alone: a captured graph keeps it.

    Args:
        config: shared numbers.
        shape: of the launch.
        tasks: attention tasks of the step.
        pages: most pages of a request.
        rows_in_ring: as of a Step.
        device: where the step runs.
    """
    return merged_sooner(_most_programs(config, shape, tasks, pages, rows_in_ring, device), tasks, config)


def _most_programs(
    config: CacheConfig, shape: LaunchShape, tasks: int, pages: int, rows_in_ring: bool, device: torch.device
) -> int:
    if config.batch_invariant:
        return most_shares(config, tasks, pages, rows_in_ring=rows_in_ring)
    return max(1, sm_count(device) * shape.programs_per_sm // config.kv_heads)


def most_partial_rows(
    config: CacheConfig, tokens: int, requests: int, pages: int, group: int, device: torch.device
) -> int:
    """Return the most partial results, rows of head_dim numbers, that any step leaves before it merges them.

    Args:
        config: shared numbers.
        tokens: most tokens of a step.
        requests: most requests of a step.
        pages: most pages of a request.
        group: query heads of one kv head.
        device: where the step runs.
    """
    widest = explicit.widest_columns(config.layout, device)
    rows_per_task, columns = chunk_task_shape(config, group, VERIFY_COLUMNS)
    kinds = [(columns, rows_per_task, tokens // rows_per_task + requests, False)]
    for rows_each in range(1, config.draft_tokens + 2):
        rows_per_task, columns = task_shape(config, group, rows_each, widest)
        kinds.append((columns, rows_per_task, requests * -(-rows_each // rows_per_task), True))
    rows = []
    for columns, rows_per_task, tasks, rows_in_ring in kinds:
        shape = launch_shape(config, columns, rows_per_task, tasks, device)
        programs = _most_programs(config, shape, tasks, pages, rows_in_ring, device)
        rows.append((programs + tasks) * config.kv_heads * columns)
    return max(rows)


def attend(
    q: torch.Tensor,
    rotated: RotatedRows,
    layer: LayerCache,
    step: Step,
    scale: float,
    logit_cap: float = 0.0,
    out: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend every query row of a step to what the read rule lets it see (`step.record_end`).

    Args:
        q: [tokens, q_heads, head_dim], model dtype, not rotated; token and head strides are free.
        rotated: the step's keys and values.
        layer: the layer's cache, sealed for this step.
        step: the forward pass.
        scale: factor on q . k.
        logit_cap: soft cap c of ``c * tanh(x / c)``; 0 for none.
        out: [tokens, q_heads, head_dim], model dtype, contiguous: where to write the output; made here if None.
        sink_logits: [q_heads], any float dtype, contiguous: learned logit of each head's sink, a key with value zero;
            neither scaled nor capped. None for none.

    Returns:
        Output [tokens, q_heads, head_dim], model dtype, un-rotated; and natural log-sum-exp [tokens, q_heads],
        float32, with the sink's.

    Determinism: bitwise for equal inputs, lengths and batch shape; with `CacheConfig.batch_invariant` a row's bits
    depend on that row's request alone. Graph-safe: yes.
    """
    if not runs_triton(layer.records):
        result, lse = attend_reference(q, rotated, layer, step, scale, logit_cap, sink_logits)
        return (result.to(layer.tails.dtype) if out is None else out.copy_(result)), lse
    config, layout = layer.config, layer.config.layout
    tokens, q_heads, head_dim = q.shape
    device = q.device
    if out is None:
        out = torch.empty(q.shape, dtype=layer.tails.dtype, device=device)
    group = q_heads // config.kv_heads
    tasks, pages = step.task_request.shape[0], step.block_table.shape[1]
    shape = launch_shape(config, step.columns, step.rows_per_task, tasks, device)
    programs = num_programs(config, shape, tasks, pages, step.rows_in_ring, device)
    options = _Options(
        step.columns, step.rows_per_task, group, step.rows_in_ring, task_block(tasks), float(logit_cap), shape, device
    )
    parts = (programs + tasks, config.kv_heads, step.columns)
    partial_out = torch.empty(*parts, head_dim, dtype=torch.float32, device=device)
    partial_lse = torch.empty(parts, dtype=torch.float32, device=device)
    launch(
        _attend_kernel(layout, device), (programs, config.kv_heads),
        q, layer.records, layer.tails, layer.sinks, rotated.k, rotated.v, step.task_request, step.task_row,
        step.work_end, step.rows, step.prefix_lens, step.seq_lens, step.own_start, step.sink_slots, step.query_start,
        step.block_table, partial_out, partial_lse, step.fills, scale, tasks, *q.stride()[:2],
        *layer.records.stride()[:3], *layer.tails.stride()[:3], *layer.sinks.stride()[:3], *rotated.k.stride()[:2],
        step.block_table.stride(0),
        constants=_constants(config, options),
    )  # fmt: skip
    return out, combine(partial_out, partial_lse, layer, step, out, sink_logits)


@functools.lru_cache(maxsize=32)
def _attend_kernel(layout: TileLayout, device: torch.device) -> Any:
    """Return the kernel for a layout."""
    if explicit.has_explicit_layouts(layout, device):
        from kvarn.core.kernels.gluon.attend import attend_kernel as explicit_kernel

        return explicit_kernel
    from kvarn.core.kernels.attend import attend_kernel

    return attend_kernel


@dataclass(frozen=True, slots=True)
class _Options:
    """What of a launch's constants a cache doesn't decide: fields of a Step, and where it runs."""

    columns: int
    rows_per_task: int
    group: int
    rows_in_ring: bool
    task_block: int
    logit_cap: float
    shape: LaunchShape
    device: torch.device


@functools.lru_cache(maxsize=256)  # steps that no graph has captured wait for it in every layer
def _constants(config: CacheConfig, options: _Options) -> Constants:
    layout, shape, device = config.layout, options.shape, options.device
    own = {"ROOM": shape.room_kib} if explicit.has_explicit_layouts(layout, device) else {"USE_ASM": has_lop3(device)}
    return Constants({
        **layout_constants(layout), "GROUP": options.group, "ROWS": options.rows_per_task, "COLUMNS": options.columns,
        "RING": config.ring_tokens, "TILES": config.tiles_per_block, "TAIL": config.tail_tokens,
        "SINK": config.sink_tokens, "SOFTCAP": options.logit_cap, "ROWS_IN_RING": options.rows_in_ring,
        "CANONICAL": config.canonical, "RAW_BLOCK": RAW_BLOCK, "TASK_BLOCK": options.task_block,
        "SHARE": units_per_share(config, rows_in_ring=options.rows_in_ring), "STAGES": shape.stages, **own,
        **chained(device), "num_warps": shape.warps, "maxnreg": shape.registers,
    })  # fmt: skip


def attend_reference(
    q: torch.Tensor, rotated: RotatedRows, layer: LayerCache, step: Step, scale: float, logit_cap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attend in plain torch, request by request, in float32 (in float64 if q comes in that, for an oracle)."""
    rotated_q = rotate_keys(q)
    fresh = torch.stack((rotated.k, rotated.v), dim=1)
    outs, lses = [], []
    starts = step.query_start.tolist()
    for request, (begin, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        position = step.token_position[begin:end]
        request_of = torch.full_like(position, request, dtype=torch.int64)
        end_of_records = record_end(layer.config, step, request_of, position)
        found = readable_rows(fresh, layer, step, request, end_of_records, partial(_decode, layout=layer.config.layout))
        visible = found.visible(layer.config, end_of_records, position, int(step.sink_slots[request]))
        own = rotated_q[begin:end]
        k, v = found.rows.to(own.dtype).unbind(1)
        out, lse = softmax_attention(own, k, v, visible, scale, logit_cap, sink_logits)
        outs.append(rotate(out, inverse=True))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def _decode(records: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """Restore records to keys and values, [tiles, kv_heads, 2, tile_tokens, head_dim]."""
    return torch.stack(decode_record(records, layout), dim=2)


def task_block(tasks: int) -> int:
    """Return how many tasks a program looks at together: all if it can, in few sizes, as each is compiled."""
    return next((block for block in _TASK_BLOCKS if tasks <= block), TASK_BLOCK)


def sm_count(device: torch.device) -> int:
    """Return the multiprocessors of a GPU; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
