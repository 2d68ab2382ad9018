"""What the halves of the SGLang adapter share: names, the pool's settings, and how the budget is divided.

The arithmetic is that of :mod:`kvarn.core.capacity`; SGLang is told its results, never a formula of our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvarn.core.capacity import CacheShape, CapacityPlan, plan_capacity
from kvarn.core.layers import LayerKind
from kvarn.errors import CapacityError

if TYPE_CHECKING:
    import torch

BACKEND_NAME = "kvarn"
# Kinds of layers that are served beside those in tiles, though not both in one model.
BESIDE_TILES = frozenset({LayerKind.MODEL_DTYPE, LayerKind.RECURRENT})
# SGLang's tokens of windows for one token of the other layers, if --swa-full-tokens-ratio is not typed.
WINDOW_RATIO = 0.8


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What a TilePool can't read from SGLang's own constructor arguments.

    Args:
        shape: what this rank caches.
        num_rows: rows of ``req_to_token``, the padding row included; one tail ring each.
        sink_slots: slots of the sink store.
        raw_dtype: dtype of the model, in which tails and sinks are kept.
    """

    shape: CacheShape
    num_rows: int
    sink_slots: int
    raw_dtype: torch.dtype


def pool_settings(shape: CacheShape, num_rows: int, raw_dtype: torch.dtype) -> PoolSettings:
    """Return the settings of a pool whose ``req_to_token`` has that many rows, the padding row included."""
    return PoolSettings(
        shape=shape,
        num_rows=num_rows,
        sink_slots=shape.sink_slots(num_rows - 1),
        raw_dtype=raw_dtype,
    )


def divide_budget(
    shape: CacheShape,
    budget_bytes: int,
    requested: int | None,
    token_cap: int | None,
    draft_bytes: int = 0,
    most_requests: int | None = None,
) -> CapacityPlan:
    """Divide the bytes that SGLang gives the cache into tails, sinks and tiles.

    Args:
        shape: what this rank caches.
        budget_bytes: bytes that SGLang profiled for the cache.
        requested: ``--max-running-requests``; None derives the limit from the budget.
        token_cap: ``--max-total-tokens``, which SGLang applies afterwards; None if there is none.
        draft_bytes: what a draft model caches of each token.
        most_requests: requests that can run at once for another reason; None if there is none.

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
        raise CapacityError(
            f"{error} In SGLang these are --max-running-requests and --mem-fraction-static; "
            "KVARN_TAIL_TOKENS=0 makes the tails smaller."
        ) from error
