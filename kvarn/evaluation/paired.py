"""Two runs over the same items, compared item by item."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pairing:
    """Where two runs disagree.

    Args:
        lost: items that only the first run has right.
        won: items that only the second has.
        p: of McNemar's exact test, two-sided: how likely so uneven a split is if each were as likely as the other.
    """

    lost: tuple[str, ...]
    won: tuple[str, ...]
    p: float


def pair(first_wrong: Collection[str], second_wrong: Collection[str]) -> Pairing:
    """Compare two runs by the names of the items that each has wrong."""
    lost = tuple(item for item in second_wrong if item not in first_wrong)
    won = tuple(item for item in first_wrong if item not in second_wrong)
    return Pairing(lost, won, mcnemar_p(len(lost), len(won)))


def mcnemar_p(lost: int, won: int) -> float:
    """Return the two-sided p of McNemar's exact test for two counts of discordant items."""
    discordant = lost + won
    tail = sum(math.comb(discordant, k) for k in range(min(lost, won) + 1))
    return min(1.0, float(2 * tail / 2**discordant))
