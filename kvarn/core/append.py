"""Rotate a step's rows and store those that stay exact: the first ones in a sink slot, the newest in the tail ring."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from kvarn.core.cache import CacheConfig, LayerCache, runs_triton
from kvarn.core.hadamard import rotate, rotate_keys, sign_matrix
from kvarn.core.launch import Constants, chained, launch
from kvarn.core.step import Step, power_of_two

# Rows and elements a warp of one program that rotates: few in a decode step, which has few rows; 16 where they are
# multiplied by a matrix, whatever the step, because a row must get the same bits by decode and by any chunk.
_FEW_TOKENS = 512
_FEW = (4, 512)
_MANY = (8, 1024)
_BY_MATRIX = (16, 512)
# Rows of one program that stores a chunk's.
_BLOCK_STORED = 16
# Channels whose part of the rotation matrix is in shared memory at a time.
_CHUNK_CHANNELS = 128
# The largest number that is finite in fp16 and exact in bf16.
RAW_MAX = 65280.0


@dataclass(frozen=True, slots=True)
class RotatedRows:
    """A step's keys and values in the rotated basis.

    Args:
        k: [tokens, kv_heads, head_dim], model dtype.
        v: [tokens, kv_heads, head_dim], model dtype.
    """

    k: torch.Tensor
    v: torch.Tensor


@functools.lru_cache(maxsize=32)
def device_signs(head_dim: int, dtype: torch.dtype, device: torch.device, transposed: bool) -> torch.Tensor:
    """Return the +1/-1 matrix on a device, made once. Every entry is exact in any float dtype."""
    signs = sign_matrix(head_dim)
    return (signs.T if transposed else signs).contiguous().to(device=device, dtype=dtype)


def rotate_rows(k: torch.Tensor, v: torch.Tensor, layer: LayerCache, step: Step, *, store: bool) -> RotatedRows:
    """Rotate keys and values, and write the first ones to sinks; with `store`, also write them to rings.

    Sinks are written before any row attends, because a request may hit a page that another one fills in the same step.

    Args:
        k: [tokens, kv_heads, head_dim], model dtype; token and head strides are free.
        v: the same.
        layer: the layer's cache.
        step: the forward pass.
        store: write rings in the same launch. Right only if no query of the step reads a row that they push out, and
            no tile that it fills begins among these.

    Determinism: a row's bits depend on that row alone. Graph-safe: yes.
    """
    if not runs_triton(k):
        rotated = rotate_rows_reference(k, v)
        store_first_reference(torch.stack((rotated.k, rotated.v), dim=1), layer, step, store=store)
        return rotated
    from kvarn.core.kernels.rotate import rotate_kernel

    tokens, kv_heads, head_dim = k.shape
    rotated = RotatedRows(*torch.empty((2, *k.shape), dtype=layer.tails.dtype, device=k.device).unbind())
    constants = _rotate_constants(layer.config, k.device, tokens <= _FEW_TOKENS, store)
    launch(
        rotate_kernel, (-(-tokens // constants.named["BLOCK"]), 2 * kv_heads),
        k, v, device_signs(head_dim, v.dtype, v.device, False), rotated.k, rotated.v, layer.tails, layer.sinks,
        step.token_request, step.token_position, step.rows, step.sink_slots, step.seq_lens, tokens, *k.stride()[:2],
        *v.stride()[:2], *layer.tails.stride()[:3], *layer.sinks.stride()[:3], constants=constants,
    )  # fmt: skip
    return rotated


@functools.lru_cache(maxsize=32)
def _rotate_constants(config: CacheConfig, device: torch.device, few: bool, store: bool) -> Constants:
    padded, head_dim = config.layout.padded_dim, config.layout.head_dim
    block, per_warp = _BY_MATRIX if padded != head_dim else _FEW if few else _MANY
    return Constants({
        "KV_HEADS": config.kv_heads, "D": head_dim, "DP": padded, "NORM": config.rotation_norm,
        "RING": config.ring_tokens, "SINK": config.sink_tokens, "STORE": store, "BLOCK": block,
        "CHUNK": min(padded, _CHUNK_CHANNELS), **chained(device),
        "num_warps": max(1, min(4, block * padded // per_warp)),
    })  # fmt: skip


def rotate_rows_reference(k: torch.Tensor, v: torch.Tensor) -> RotatedRows:
    """Rotate in float32 and round to the rows' dtype."""
    rotated = (rotate_keys(k), rotate(v))
    return RotatedRows(*(x.clamp(-RAW_MAX, RAW_MAX).to(k.dtype) for x in rotated))


def store_tail(rotated: RotatedRows, layer: LayerCache, step: Step) -> None:
    """Store the rows of a chunk that rings keep, after the chunk was attended to.

    Determinism: bitwise. Graph-safe: yes.
    """
    if not runs_triton(rotated.k):
        store_tail_reference(rotated, layer, step)
        return
    launch_store(rotated.k, rotated.v, layer, step)


def launch_store(first: torch.Tensor, second: torch.Tensor, layer: LayerCache[Any], step: Step) -> None:
    """Launch the kernel that stores a chunk's rows, [tokens, kv_heads, width] of each raw row of a token."""
    from kvarn.core.kernels.rotate import store_tail_kernel

    tokens, kv_heads, width = first.shape
    parts = layer.tails.shape[1]
    launch(
        store_tail_kernel, (-(-tokens // _BLOCK_STORED), parts * kv_heads),
        first, second, layer.tails, layer.sinks, step.token_request, step.token_position, step.rows, step.sink_slots,
        step.seq_lens, tokens, *layer.tails.stride()[:3], *layer.sinks.stride()[:3],
        constants=_store_constants(layer.config, kv_heads, width),
    )  # fmt: skip


@functools.lru_cache(maxsize=32)
def _store_constants(config: CacheConfig[Any], kv_heads: int, width: int) -> Constants:
    return Constants({
        "KV_HEADS": kv_heads, "D": width, "DP": power_of_two(width), "RING": config.ring_tokens,
        "SINK": config.sink_tokens, "BLOCK": _BLOCK_STORED,
    })  # fmt: skip


def store_tail_reference(rotated: RotatedRows, layer: LayerCache, step: Step) -> None:
    """Store keys and values in plain torch."""
    store_rows_reference(torch.stack((rotated.k, rotated.v), dim=1), layer, step)


def store_first_reference(rows: torch.Tensor, layer: LayerCache[Any], step: Step, *, store: bool) -> None:
    """Do in plain torch what rotating does beside: store rows in sinks, with `store` in rings, too."""
    if store:
        store_rows_reference(rows, layer, step)
    else:
        _store_sinks(rows, layer, step)


def store_rows_reference(rows: torch.Tensor, layer: LayerCache[Any], step: Step) -> None:
    """Store the raw rows of a step's tokens, [tokens, parts, kv_heads, width], in plain torch."""
    request = step.token_request.long()
    position = step.token_position.long()
    ring = layer.config.ring_tokens
    kept = position >= step.seq_lens[request] - ring
    layer.tails[step.rows[request[kept]].long(), :, :, position[kept] % ring] = rows[kept].to(layer.tails.dtype)
    _store_sinks(rows, layer, step)


def _store_sinks(rows: torch.Tensor, layer: LayerCache[Any], step: Step) -> None:
    position = step.token_position.long()
    slot = step.sink_slots[step.token_request.long()].long()
    sink = (slot >= 0) & (position < layer.config.sink_tokens)
    layer.sinks[slot[sink], :, :, position[sink]] = rows[sink].to(layer.sinks.dtype)
