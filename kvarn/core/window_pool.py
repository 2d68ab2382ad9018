"""Layers with a sliding window in a pool of their own, in the model's dtype, beside a pool of tiles.

An engine with two pools sizes them by a ratio: so many tokens of windows for one token of the other layers. Made for
two pools of one dtype, the same ratio would give windows nearly all memory where the other layers hold tiles.
"""

from dataclasses import dataclass

from kvarn.core.capacity import CacheShape, CapacityPlan
from kvarn.core.windows import WindowShape

# Beside its window, a running request holds a page that it fills, one it left, and one that its next step may need.
_PAGES_BESIDE_WINDOW = 3


@dataclass(frozen=True, slots=True)
class WindowPool:
    """The pool of windows.

    Args:
        shape: the pool of tiles, without windows.
        windows: the layers with a window.
        ratio: tokens of this pool for one token in tiles.
        draft_bytes: what a draft model caches of each token beside its records.
    """

    shape: CacheShape
    windows: WindowShape
    ratio: float
    draft_bytes: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers with a window."""
        return self.windows.layers * self.windows.token_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, e.g. of the engine's padding page."""
        return self.bytes_per_token * self.shape.preset.tile_tokens

    @property
    def bytes_of_both(self) -> float:
        """Bytes of one token in tiles, of its rows of a draft model, and its share of the windows."""
        return self.shape.bytes_per_token + self.draft_bytes + self.ratio * self.bytes_per_token

    def bytes_left(self, plan: CapacityPlan) -> int:
        """Return the bytes of all pools that a plan without windows leaves beside tails, sinks and padding."""
        return plan.tokens * (self.shape.bytes_per_token + self.draft_bytes) - self.page_bytes

    def tokens(self, plan: CapacityPlan) -> int:
        """Return the tokens in tiles where windows take their share of a plan for tiles alone."""
        tile = self.shape.preset.tile_tokens
        return max(0, int(self.bytes_left(plan) / self.bytes_of_both) // tile * tile)

    def most_requests(self, budget_bytes: int) -> int:
        """Return how many requests' windows fit at once; at least 1.

        Args:
            budget_bytes: bytes of both pools.
        """
        tokens = int(self.ratio * budget_bytes / self.bytes_of_both)
        pages = _PAGES_BESIDE_WINDOW * self.shape.preset.tile_tokens
        return max(1, tokens // (self.windows.tokens + pages))


def scaled_ratio(shape: CacheShape, ratio: float) -> float:
    """Return the ratio at which windows take the bytes that they would take beside a pool of the model's dtype.

    Args:
        shape: the pool of tiles.
        ratio: what the engine uses for two pools of the model's dtype.
    """
    return ratio * shape.bytes_per_token / shape.raw_bytes_per_token
