"""Seal: turn every tile that becomes full in a step into its record."""

import functools

import torch

from kvarn.core.append import RotatedRows, rotate_rows, rotate_rows_reference, store_first_reference
from kvarn.core.attend import NARROW_REGISTERS
from kvarn.core.cache import CacheConfig, LayerCache, layout_constants, runs_triton
from kvarn.core.launch import Constants, chained, launch
from kvarn.core.reference import SCALE_MAX, encode, key_clip, value_clip
from kvarn.core.step import Step

# Chunks fill many tiles. In a decode step few or none are filled, and more warps with fewer registers find that sooner.
_CHUNK_ELEMENTS_PER_WARP = 4096
_DECODE_ELEMENTS_PER_WARP = 2048
# In a decode step few requests fill a tile: no more programs than run at once, each looking at so many requests. Up to
# half of them have a multiprocessor each.
_DECODE_PROGRAMS = 256
# Registers of a multiprocessor, and of a thread where two programs of eight warps run on one, though a tile takes half
# as long again. Else threads have as many as attention's, whose programs fit then where such a one was.
_REGISTERS, _REGISTERS_BY_TWO = 65536, 128
SEAL_TASK_BLOCK = 32
# Requests of a decode step up to which a launch saved is worth more than rows rotated by more programs; 0 for never.
_APPENDED_AT_ONCE = 64
_ROWS_AT_ONCE = 8


def append_and_seal(k: torch.Tensor, v: torch.Tensor, layer: LayerCache, step: Step) -> RotatedRows:
    """Rotate a step's rows, store them as far as the step does so before it attends, and seal the tiles they fill.

    Args:
        k: [tokens, kv_heads, head_dim], model dtype; token and head strides are free.
        v: the same.
        layer: the layer's cache.
        step: the forward pass.

    Determinism: as of `rotate_rows` and `seal`; one launch writes the same bits as two. Graph-safe: yes.
    """
    tokens, kv_heads, head_dim = k.shape
    one_each = step.rows_in_ring and tokens == step.seal_tile.shape[0]
    if not runs_triton(k) or not one_each or tokens > _APPENDED_AT_ONCE or layer.config.layout.padded_dim != head_dim:
        rotated = rotate_rows(k, v, layer, step, store=step.stores_first)
        seal(rotated, layer, step)
        return rotated
    from kvarn.core.kernels.append import append_kernel

    rotated = RotatedRows(*torch.empty((2, *k.shape), dtype=layer.tails.dtype, device=k.device).unbind())
    programs = seal_programs(step, 2 * kv_heads)
    launch(
        append_kernel, (programs, kv_heads, 2),
        k, v, rotated.k, rotated.v, layer.tails, layer.sinks, layer.records, step.seal_request, step.seal_tile,
        step.rows, step.sink_slots, step.prefix_lens, step.seq_lens, step.query_start, step.block_table,
        step.fills, tokens,
        *k.stride()[:2], *v.stride()[:2], *layer.records.stride()[:3], *layer.tails.stride()[:3],
        *layer.sinks.stride()[:3], step.block_table.stride(0), NORM=layer.config.rotation_norm,
        SINK=layer.config.sink_tokens, ROWS_AT_ONCE=_ROWS_AT_ONCE,
        constants=_constants(layer.config, layer.records.device, step.rows_in_ring, programs),
    )  # fmt: skip
    return rotated


def append_and_seal_reference(k: torch.Tensor, v: torch.Tensor, layer: LayerCache, step: Step) -> RotatedRows:
    """Do the same in plain torch, whatever the device, but leave rings that attention without flash may read alone."""
    rotated = rotate_rows_reference(k, v)
    store_first_reference(torch.stack((rotated.k, rotated.v), dim=1), layer, step, store=step.rows_in_ring)
    seal_reference(rotated, layer, step)
    return rotated


def seal(rotated: RotatedRows, layer: LayerCache, step: Step) -> None:
    """Write the records of all tiles that are full after this step, in every kv head.

    Rows below the committed length come from the ring, the step's own from `rotated` (or all from the ring, where the
    step stores its rows first). Sealing a tile again gives the same bytes.

    Args:
        rotated: the step's rows.
        layer: the layer's cache; its records are written.
        step: the forward pass.

    Determinism: a record depends on its tile's rows alone. Graph-safe: yes (fixed grid, tiles found on the device).
    """
    if not runs_triton(layer.records):
        seal_reference(rotated, layer, step)
        return
    from kvarn.core.kernels.seal import seal_kernel

    programs = seal_programs(step, 2 * layer.config.kv_heads)
    launch(
        seal_kernel, (programs, layer.config.kv_heads, 2),
        layer.tails, rotated.k, rotated.v, layer.records, step.seal_request, step.seal_tile, step.rows,
        step.prefix_lens, step.seq_lens, step.query_start, step.block_table, step.seal_tile.shape[0],
        *layer.records.stride()[:3], *layer.tails.stride()[:3], *rotated.k.stride()[:2], step.block_table.stride(0),
        ROWS_IN_RING=step.rows_in_ring,
        constants=_constants(layer.config, layer.records.device, step.rows_in_ring, programs),
    )  # fmt: skip


def _constants(config: CacheConfig, device: torch.device, rows_in_ring: bool, programs: int) -> Constants:
    """Return the constants and options that both kernels take which seal."""
    by_two = rows_in_ring and 2 * programs * config.kv_heads > _DECODE_PROGRAMS // 2
    return _kernel_constants(config, device, rows_in_ring, by_two)


@functools.lru_cache(maxsize=32)  # as of `layout_constants`
def _kernel_constants(config: CacheConfig, device: torch.device, rows_in_ring: bool, by_two: bool) -> Constants:
    layout = config.layout
    constants = layout_constants(layout)
    elements_per_warp = _DECODE_ELEMENTS_PER_WARP if rows_in_ring else _CHUNK_ELEMENTS_PER_WARP
    warps = min(16, max(4, layout.tile_tokens * constants["DP"] // elements_per_warp))
    registers = _REGISTERS_BY_TWO if by_two and warps == 8 else min(NARROW_REGISTERS, _REGISTERS // (32 * warps))
    return Constants({
        **constants, "RING": config.ring_tokens, "TILES": config.tiles_per_block, "KEY_BITS": layout.key_bits,
        "VALUE_BITS": layout.value_bits, "KEY_CLIP": key_clip(layout.key_bits),
        "VALUE_CLIP": value_clip(layout.value_bits, layout.head_dim), "SCALE_MAX": SCALE_MAX,
        "BLOCK": SEAL_TASK_BLOCK if rows_in_ring else 1, **chained(device), "num_warps": warps,
        "maxnreg": registers if rows_in_ring else None,
    })  # fmt: skip


def seal_programs(step: Step, parts: int) -> int:
    """Return how many programs go through a step's tiles, for each of so many parts of a record."""
    tasks = step.seal_tile.shape[0]
    return min(tasks, -(-_DECODE_PROGRAMS // parts)) if step.rows_in_ring else tasks


def seal_reference(rotated: RotatedRows, layer: LayerCache, step: Step) -> None:
    """Seal in plain torch, one page at a time, so that a record's bits can't depend on how many are sealed."""
    tile_tokens = layer.config.tile_tokens
    for request, tile in zip(step.seal_request.tolist(), step.seal_tile.tolist(), strict=True):
        if tile < 0:
            continue
        rows = [_row(rotated, layer, step, request, tile * tile_tokens + i) for i in range(tile_tokens)]
        k, v = torch.stack(rows, dim=2).unbind(0)  # [kv_heads, tile_tokens, head_dim] each
        page = layer.pages_of(step.block_table[request, tile].long())
        layer.records[page] = encode(k.float(), v.float(), layer.config.layout)


def _row(rotated: RotatedRows, layer: LayerCache, step: Step, request: int, position: int) -> torch.Tensor:
    """Return the raw row of a position, [2, kv_heads, head_dim]."""
    prefix = int(step.prefix_lens[request])
    if position < prefix or step.rows_in_ring:
        return layer.tails[int(step.rows[request]), :, :, position % layer.config.ring_tokens]
    token = int(step.query_start[request]) + position - prefix
    return torch.stack((rotated.k[token], rotated.v[token])).to(layer.tails.dtype)
