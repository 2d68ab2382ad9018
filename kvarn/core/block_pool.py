"""BlockPool: the caches of all layers in blocks that an engine hands out, for records and for rings alike."""

from collections.abc import Sequence
from typing import Any

import torch

from kvarn.core.cache import CacheConfig, LayerCache
from kvarn.core.capacity import CacheShape
from kvarn.core.tail import TailState


class BlockPool:
    """The caches of all layers, over memory that an engine allocated.

    A request holds some blocks for its rings. Rings of several layers share a block, one after the other; a block's
    place among those of its request is their *column*.

    Args:
        shape: what this rank caches.
        caches: of each layer, [blocks, kv_heads, tokens, bytes a token], uint8; of latents, without heads.
        rings: [blocks, heads, tokens, bytes a token], uint8: the blocks as the engine hands them out for rings.
        sinks: `allocate_sinks`.

    Attributes:
        config: shared numbers.
        layers: of every attention layer in order, over records, rings and sinks.
        state: ring owners and sinks. A ring is known by its request's first block.
        rings_per_block: layers whose rings share a column.

    Raises:
        RuntimeError: a layer's cache doesn't keep a record in one piece.
    """

    def __init__(
        self, shape: CacheShape, caches: Sequence[torch.Tensor], rings: torch.Tensor, sinks: torch.Tensor
    ) -> None:
        records = [_records(cache, shape) for cache in caches]
        blocks, tiles = records[0].shape[:2]
        self.config = CacheConfig.of(shape, tiles)
        self.rings_per_block = shape.rings_per_block(tiles)
        self.layers: list[LayerCache[Any]] = [
            LayerCache(self.config, memory, _rings(rings, shape, i % self.rings_per_block, own.dtype), own)
            for i, (memory, own) in enumerate(zip(records, sinks, strict=True))
        ]
        self.state = TailState(self.config, blocks, blocks, sinks.shape[1], sinks.device)


def allocate_sinks(shape: CacheShape, slots: int, raw_dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate the sinks of all layers, zeroed: [layers, slots, raw rows of a token, kv_heads, sink_tokens, width]."""
    parts, width = shape.layout.raw_shape
    rows = (shape.layers, slots, parts, shape.kv_heads, shape.sink_tokens, width)
    return torch.zeros(rows, dtype=raw_dtype, device=device)


def _records(cache: torch.Tensor, shape: CacheShape) -> torch.Tensor:
    """View a layer's blocks, [blocks, kv_heads, tokens, bytes a token], as [blocks, tiles, kv_heads, record_bytes]."""
    if cache.dim() == 3:  # of latents, without heads
        cache = cache[:, None]
    blocks, heads, tokens, content = cache.shape
    tile = shape.preset.tile_tokens
    if content * tile != shape.layout.record_bytes or cache.stride()[2:] != (content, 1):
        raise RuntimeError(
            f"The engine laid the cache out as {tuple(cache.shape)} with strides {cache.stride()}, which doesn't keep "
            f"a record of {shape.layout.record_bytes} bytes in one piece."
        )
    strides = (cache.stride(0), tile * content, cache.stride(1), 1)
    return cache.as_strided((blocks, tokens // tile, heads, tile * content), strides, cache.storage_offset())


def _rings(rings: torch.Tensor, shape: CacheShape, place: int, raw_dtype: torch.dtype) -> torch.Tensor:
    """View one place of every block as a ring, [blocks, raw rows of a token, kv_heads, ring_tokens, width]."""
    blocks, _, tokens, content = rings.shape
    memory = rings.as_strided((blocks, tokens * content), (rings.stride(0), 1))
    ring = memory[:, place * shape.ring_bytes : (place + 1) * shape.ring_bytes].view(raw_dtype)
    parts, width = shape.layout.raw_shape
    return ring.view(blocks, parts, shape.kv_heads, shape.ring_tokens, width)
