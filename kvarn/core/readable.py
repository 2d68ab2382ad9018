"""What a request's queries may read, gathered in plain torch: records, sinks, ring rows and the step's own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kvarn.core.cache import CacheConfig, LayerCache
from kvarn.core.step import Step

_RECORD, _SINK, _RAW = range(3)


class ReadableRows(NamedTuple):
    """Rows that some query of a request may read. A position may stand here twice, restored and exact.

    Args:
        rows: [rows, parts, kv_heads, width], float32.
        position: [rows], of each.
        source: [rows], where each comes from.
    """

    rows: torch.Tensor
    position: torch.Tensor
    source: torch.Tensor

    def visible(
        self, config: CacheConfig[Any], end_of_records: torch.Tensor, position: torch.Tensor, sink_slot: int
    ) -> torch.Tensor:
        """Return which of these rows each query reads, [queries, rows], bool.

        Args:
            config: shared numbers.
            end_of_records: [queries], `step.record_end` of each.
            position: [queries].
            sink_slot: of the request, or -1.
        """
        end = end_of_records[:, None]
        exact = config.sink_tokens if sink_slot >= 0 else 0
        stored = (self.position < end) & ((self.source == _SINK) == (self.position < exact))
        return torch.where(self.source == _RAW, self.position >= end, stored) & (self.position <= position[:, None])


def readable_rows(
    fresh: torch.Tensor,
    layer: LayerCache[Any],
    step: Step,
    request: int,
    end_of_records: torch.Tensor,
    decode: Callable[[torch.Tensor], torch.Tensor],
) -> ReadableRows:
    """Gather every row that some query of a request may read.

    Args:
        fresh: the step's rows, [tokens, parts, kv_heads, width].
        layer: the layer's cache.
        step: the forward pass.
        request: index in the step.
        end_of_records: of its queries.
        decode: restores records [tiles, kv_heads, record_bytes] to [tiles, kv_heads, parts, tile_tokens, width].
    """
    config = layer.config
    tiles = int(end_of_records.max()) // config.tile_tokens
    restored = decode(layer.records[layer.pages_of(step.block_table[request, :tiles].long())])
    parts = [(restored.permute(0, 3, 2, 1, 4).flatten(0, 1), torch.arange(tiles * config.tile_tokens), _RECORD)]
    slot = int(step.sink_slots[request])
    if tiles and slot >= 0:
        parts.append((layer.sinks[slot].permute(2, 0, 1, 3), torch.arange(config.sink_tokens), _SINK))
    prefix, length = int(step.prefix_lens[request]), int(step.seq_lens[request])
    raw_start = int(end_of_records.min())
    ring_end = max(raw_start, length if step.rows_in_ring else prefix)
    ring_at = torch.arange(raw_start, ring_end)
    ring = layer.tails[int(step.rows[request])].permute(2, 0, 1, 3)
    parts.append((ring[ring_at % config.ring_tokens], ring_at, _RAW))
    fresh_at = torch.arange(ring_end, length)
    parts.append((fresh[fresh_at + int(step.query_start[request]) - prefix], fresh_at, _RAW))
    device = layer.records.device
    return ReadableRows(
        torch.cat([rows.float() for rows, _, _ in parts]),
        torch.cat([at for _, at, _ in parts]).to(device),
        torch.cat([torch.full(at.shape, kind, device=device) for _, at, kind in parts]),
    )
