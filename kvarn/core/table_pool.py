"""A pool of pages beside a table of requests, each of whose rows has a tail ring: its settings, and its budget.

Arithmetic is that of :mod:`kvarn.core.capacity`. Imports neither torch nor an engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvarn.core.capacity import CacheShape, CapacityPlan, plan_capacity
from kvarn.errors import CapacityError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What a pool is made with beside its pages.

    Args:
        shape: what this rank caches.
        num_rows: rows of the table, the padding row included; one tail ring each.
        sink_slots: slots of the sink store.
        raw_dtype: dtype of the model, in which tails and sinks are kept.
    """

    shape: CacheShape
    num_rows: int
    sink_slots: int
    raw_dtype: torch.dtype


def pool_settings(shape: CacheShape, num_rows: int, raw_dtype: torch.dtype) -> PoolSettings:
    """Return the settings of a pool beside a table of that many rows, the padding row included."""
    return PoolSettings(shape, num_rows, shape.sink_slots(num_rows - 1), raw_dtype)


def divide_budget(
    shape: CacheShape,
    budget_bytes: int,
    requested: int | None,
    token_cap: int | None,
    draft_bytes: int = 0,
    most_requests: int | None = None,
    advice: str = "",
) -> CapacityPlan:
    """Divide the bytes that an engine gives the cache into tails, sinks and tiles.

    Args:
        shape: what this rank caches.
        budget_bytes: bytes for the cache.
        requested: the request limit that was typed; None derives one from the budget.
        token_cap: a limit of tokens that the engine applies afterwards; None if there is none.
        draft_bytes: what a draft model caches of each token.
        most_requests: requests that can run at once for another reason; None if there is none.
        advice: ends the error: by which flags a user lowers the request limit or gives more memory.

    Raises:
        CapacityError: tails and sinks leave no room for a page.
    """
    try:
        if requested is not None:
            return plan_capacity(shape, budget_bytes, min(requested, most_requests or requested), draft_bytes)
        plan = plan_capacity(shape, budget_bytes, None, draft_bytes)
        # A running request needs a page of its own, so more tail rings than pages could never be in use.
        tokens = plan.tokens if token_cap is None else min(plan.tokens, token_cap)
        pages = max(1, tokens // shape.preset.tile_tokens)
        most = min(pages, most_requests or pages)
        return plan if plan.max_requests <= most else plan_capacity(shape, budget_bytes, most, draft_bytes)
    except CapacityError as error:
        raise CapacityError(f"{error} {advice}".rstrip()) from error
