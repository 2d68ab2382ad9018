"""The read rule: up to which position a query reads records. Later positions are read raw."""

from typing import Any

import torch

from kvarn.core.cache import CacheConfig


def record_end(
    config: CacheConfig[Any], committed: torch.Tensor, position: torch.Tensor, own_start: torch.Tensor
) -> torch.Tensor:
    """Apply the read rule.

    A tile comes from its record if it lies wholly below the committed length and ended at least tail_tokens before
    the query, or if the query's request didn't write its rows (a prefix hit).

    Args:
        config: shared numbers.
        committed: tokens of each query's request whose tiles are sealed when it reads: those before the step, or, in
            canonical mode, those after it.
        position: of each query.
        own_start: first position whose raw rows each query's request wrote itself.
    """
    sealed = torch.minimum(committed, position - config.tail_tokens).clamp_min(0)
    return torch.maximum(sealed // config.tile_tokens * config.tile_tokens, own_start)
