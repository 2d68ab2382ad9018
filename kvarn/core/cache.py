"""The tensors of one layer's cache, and the numbers that all layers share."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, Protocol

import torch
from typing_extensions import TypeVar

from kvarn import env
from kvarn.core.capacity import CacheShape
from kvarn.core.layout import KEY_GROUP_TOKENS, TileLayout, field_constants


class RecordLayout(Protocol):
    """What caches ask of the layout of their records, whatever these hold."""

    @property
    def tile_tokens(self) -> int:
        """Tokens of a record."""

    @property
    def head_dim(self) -> int:
        """Channels of a value, which are rotated together."""

    @property
    def padded_dim(self) -> int:
        """head_dim rounded up to a power of two: the width of a row inside a kernel."""

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""

    @property
    def raw_shape(self) -> tuple[int, int]:
        """Raw rows of a token and kv head, and the numbers of one."""


# Records are tiles of keys and values unless something else is said.
LayoutT = TypeVar("LayoutT", bound=RecordLayout, default=TileLayout)


@dataclass(frozen=True, slots=True)
class CacheConfig(Generic[LayoutT]):
    """What every layer's cache has in common.

    Args:
        layout: byte layout of a record.
        kv_heads: kv heads of a layer on this rank.
        tail_tokens: newest tokens that are read exact (R).
        sink_tokens: first tokens that are read exact (S).
        ring_tokens: rows of a request's tail ring; at least a tile, the exact tail and one step's drafts.
        canonical: read every full tile below a query's own from its record, those of the same step included.
        batch_invariant: sum each row's attention in an order that doesn't depend on the rest of the batch.
        tiles_per_block: tiles of one block, the unit in which the engine hands out memory. A page holds one tile;
            page p is tile p % tiles_per_block of block p // tiles_per_block.
        draft_tokens: most speculative tokens that one step writes for a request; fewer than a tile has.
    """

    layout: LayoutT
    kv_heads: int
    tail_tokens: int
    sink_tokens: int
    ring_tokens: int
    canonical: bool = False
    batch_invariant: bool = False
    tiles_per_block: int = 1
    draft_tokens: int = 0

    def __post_init__(self) -> None:
        needed = self.layout.tile_tokens + self.tail_tokens + self.draft_tokens
        if self.ring_tokens < needed:
            raise ValueError(f"A ring of {self.ring_tokens} rows is too short; tile, tail and drafts need {needed}.")
        if not 0 <= self.draft_tokens < self.layout.tile_tokens:
            raise ValueError(f"{self.draft_tokens} drafts a step don't fit: a step may fill one tile of a request.")
        if self.sink_tokens > self.layout.tile_tokens:
            raise ValueError(f"{self.sink_tokens} sinks don't fit into a tile of {self.layout.tile_tokens} tokens.")
        if self.canonical and (self.tail_tokens or self.sink_tokens):
            raise ValueError("Canonical mode reads every full tile from its record: set tail and sinks to 0.")

    @classmethod
    def of(cls, shape: CacheShape, tiles_per_block: int = 1) -> "CacheConfig[Any]":
        """Return the numbers of a cache of that shape. The environment says if it is canonical or batch-invariant."""
        return CacheConfig(
            layout=shape.layout,
            kv_heads=shape.kv_heads,
            tail_tokens=shape.tail_tokens,
            sink_tokens=shape.sink_tokens,
            ring_tokens=shape.ring_tokens,
            canonical=env.canonical(),
            batch_invariant=env.batch_invariant(),
            tiles_per_block=tiles_per_block,
            draft_tokens=shape.draft_tokens,
        )

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return self.layout.tile_tokens

    @property
    def rotation_norm(self) -> float:
        """Factor that makes the values' +1/-1 matrix orthonormal."""
        return 1.0 / math.sqrt(self.layout.head_dim)


@dataclass(frozen=True, slots=True)
class LayerCache(Generic[LayoutT]):
    """One layer's cache.

    Args:
        config: shared numbers.
        records: [blocks, tiles_per_block, kv_heads, record_bytes], uint8. All strides but the last are free.
        tails: [rows, 2, kv_heads, ring_tokens, head_dim], model dtype, rotated: keys, then values. Of latents,
            [rows, 1, 1, ring_tokens, row_dim].
        sinks: [slots, 2, kv_heads, sink_tokens, head_dim], model dtype, rotated; of latents as tails are.
    """

    config: CacheConfig[LayoutT]
    records: torch.Tensor
    tails: torch.Tensor
    sinks: torch.Tensor

    def pages_of(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the indices by which `records` finds some pages."""
        return pages // self.config.tiles_per_block, pages % self.config.tiles_per_block


def allocate_layer(
    config: CacheConfig[LayoutT],
    blocks: int,
    rows: int,
    sink_slots: int,
    raw_dtype: torch.dtype,
    device: torch.device | str,
) -> LayerCache[LayoutT]:
    """Allocate one layer's cache, zeroed: a record of zeros restores to zeros, never to NaN."""
    heads, tiles = config.kv_heads, config.tiles_per_block
    parts, width = config.layout.raw_shape
    return LayerCache(
        config,
        torch.zeros(blocks, tiles, heads, config.layout.record_bytes, dtype=torch.uint8, device=device),
        torch.zeros(rows, parts, heads, config.ring_tokens, width, dtype=raw_dtype, device=device),
        torch.zeros(sink_slots, parts, heads, config.sink_tokens, width, dtype=raw_dtype, device=device),
    )


def layer_bytes(layer: LayerCache[Any]) -> tuple[int, int]:
    """Return the bytes that a layer's keys and values take: records, tails and sinks. Latents are keys."""
    records, raw, layout = layer.records.nbytes, layer.tails.nbytes + layer.sinks.nbytes, layer.config.layout
    if not isinstance(layout, TileLayout):
        return records + raw, 0
    keys = records * layout.value_codes_offset // layout.record_bytes
    return keys + raw // 2, records - keys + raw // 2


def runs_triton(tensor: torch.Tensor) -> bool:
    """Tell whether an operation on this tensor goes to the Triton kernel or to the torch reference."""
    return tensor.is_cuda or env.force_triton()


@functools.lru_cache(maxsize=32)  # every launch asks; launches that no graph has captured wait for Python
def layout_constants(layout: TileLayout) -> Mapping[str, Any]:
    """Return the compile-time constants by which kernels find their way in a record."""
    constants = {
        "D": layout.head_dim,
        "DP": layout.padded_dim,
        "G": layout.tile_tokens,
        "GROUP_TOKENS": KEY_GROUP_TOKENS,
        "K_FIELDS": field_constants(layout.key_fields),
        "V_FIELDS": field_constants(layout.value_fields),
        "OFFSETS": (layout.k_scale_offset, layout.k_offset_offset, layout.v_scale_offset, layout.v_offset_offset),
    }
    return MappingProxyType(constants)
