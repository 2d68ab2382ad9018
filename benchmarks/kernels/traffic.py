"""Traffic: the bytes of keys and values that a step reads, by the read rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvarn.core.cache import CacheConfig
from kvarn.core.step import Step, record_end


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one layer's attention must read at least once.

    Args:
        records: of tiles that some query row reads, without padding.
        raw: of ring rows and of the step's own rows.
        sinks: of sink rows.
    """

    records: int
    raw: int
    sinks: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.records + self.raw + self.sinks


def read_traffic(config: CacheConfig, step: Step, raw_bytes: int) -> Traffic:
    """Count what a step reads in all kv heads. The query rows of a request share what they read.

    Args:
        config: the cache's numbers.
        step: the forward pass.
        raw_bytes: bytes of one raw number.
    """
    request = step.token_request.long()
    end = record_end(config, step, request, step.token_position).long()
    requests = step.rows.shape[0]
    furthest = torch.zeros(requests, dtype=torch.int64, device=end.device)
    furthest.scatter_reduce_(0, request, end, "amax")
    nearest = step.seq_lens.long().scatter_reduce(0, request, end, "amin")
    with_sinks = int(((furthest > 0) & (step.sink_slots >= 0)).sum())
    row_bytes = 2 * config.kv_heads * config.layout.head_dim * raw_bytes
    return Traffic(
        records=int(furthest.sum()) // config.tile_tokens * config.layout.payload_bytes * config.kv_heads,
        raw=int((step.seq_lens.long() - nearest).sum()) * row_bytes,
        sinks=with_sinks * config.sink_tokens * row_bytes,
    )
