"""Operation: something to time on one case, and how its output is checked first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Operation:
    """A way to compute attention for a case, over several copies of its own cache.

    Args:
        name: of the implementation.
        copies: copies of the cache, more than the L2 can keep.
        run: launches it on one copy and returns the output; no host synchronisation.
        error: runs it on copy 0 and returns the relative RMS error against float64 over its own inputs.
        tolerance: the largest error with which its time counts.
        note: what a reader of the time must know, e.g. the format.
    """

    name: str
    copies: int
    run: Callable[[int], torch.Tensor]
    error: Callable[[], float]
    tolerance: float
    note: str = ""
