"""How many tokens and requests a byte budget holds. Integer arithmetic only; imports neither torch nor an engine.

Both adapters size their memory with it, so what is announced, what is planned and what is allocated agree.
"""

from dataclasses import dataclass

from kvarn import env
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.layout import TileLayout
from kvarn.core.windows import WindowShape
from kvarn.errors import CapacityError
from kvarn.presets import Preset

# Raw tails take at most this share of the budget when the user sets no request limit.
_TAIL_BUDGET_DIVISOR = 10
# More running requests than this are never the limit in practice; both engines default to the same order.
_MAX_DEFAULT_REQUESTS = 4096
_MOST_TILES_PER_BLOCK = 8
# A larger block must take less than the smaller by this factor.
_WORTH_A_LARGER_BLOCK = 1.1
# Distinct cached prompts that keep their sinks exact, for each running request.
_SINK_SLOTS_PER_REQUEST = 8


def ring_tokens(preset: Preset, tail_tokens: int, draft_tokens: int = 0) -> int:
    """Return the rows of one request's tail ring: the open tile, the exact tail and one step's drafts."""
    return preset.tile_tokens + tail_tokens + draft_tokens


def raw_token_bytes(*, layers: int, kv_heads: int, head_dim: int, v_head_dim: int, raw_bytes: int) -> int:
    """Return the bytes of one token's rows of K and V over all heads and layers."""
    return (head_dim + v_head_dim) * raw_bytes * kv_heads * layers


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one rank caches.

    Args:
        preset: the preset in use.
        layers: layers that hold quantised tiles on this rank.
        kv_heads: kv heads of one layer on this rank.
        head_dim: channels of one head, for K and V alike.
        raw_bytes: bytes of one raw number (2 for fp16 and bf16, 4 for float32).
        tail_tokens: newest tokens that stay exact (R).
        sink_tokens: first tokens that stay exact (S).
        draft_tokens: most speculative tokens that one step writes.
        windows: layers beside those that keep a window of tokens in the model's dtype; None if there are none.
    """

    preset: Preset
    layers: int
    kv_heads: int
    head_dim: int
    raw_bytes: int
    tail_tokens: int
    sink_tokens: int
    draft_tokens: int = 0
    windows: WindowShape | None = None

    @property
    def layout(self) -> TileLayout | LatentLayout:
        """Layout of a record."""
        return TileLayout.of(self.preset, self.head_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page (one tile of every head and layer)."""
        return self.layout.record_bytes * self.kv_heads * self.layers

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one sealed token over all heads and layers, rounded up."""
        return -(-self.page_bytes // self.preset.tile_tokens)

    @property
    def raw_bytes_per_token(self) -> int:
        """Bytes of one raw token over all heads and layers: what the model dtype costs."""
        rows, width = self.layout.raw_shape
        return rows * width * self.raw_bytes * self.kv_heads * self.layers

    @property
    def ring_tokens(self) -> int:
        """Rows of one request's tail ring."""
        return ring_tokens(self.preset, self.tail_tokens, self.draft_tokens)

    @property
    def tail_bytes_per_request(self) -> int:
        """Bytes of one request's tail ring over all heads and layers."""
        return self.ring_tokens * self.raw_bytes_per_token

    @property
    def ring_bytes(self) -> int:
        """Bytes of one request's tail ring in one layer."""
        return self.tail_bytes_per_request // self.layers

    def block_bytes(self, tiles_per_block: int) -> int:
        """Bytes of one block of the engine that holds some tiles of every layer, or at least one layer's ring."""
        return max(tiles_per_block * self.page_bytes, self.ring_bytes)

    def rings_per_block(self, tiles_per_block: int) -> int:
        """Layers' rings that fit into one block of the engine."""
        return min(self.layers, self.block_bytes(tiles_per_block) // self.ring_bytes)

    def tail_blocks(self, tiles_per_block: int) -> int:
        """Blocks that hold one request's tail rings, where rings live in the engine's own blocks."""
        return -(-self.layers // self.rings_per_block(tiles_per_block))

    @property
    def sink_bytes_per_slot(self) -> int:
        """Bytes of one sink slot over all heads and layers."""
        return self.sink_tokens * self.raw_bytes_per_token

    def sink_slots(self, max_requests: int) -> int:
        """Slots of the sink store: several cached prompts for every running request."""
        return _SINK_SLOTS_PER_REQUEST * max_requests if self.sink_tokens else 0

    def fixed_bytes(self, max_requests: int) -> int:
        """Bytes that don't grow with the tokens: tails (one spare row for padding), sinks and windows."""
        tails = (max_requests + 1) * self.tail_bytes_per_request
        return tails + self.sink_slots(max_requests) * self.sink_bytes_per_slot + max_requests * self.window_bytes

    @property
    def window_bytes(self) -> int:
        """Bytes of a request in layers with a window."""
        return 0 if self.windows is None else self.windows.bytes_per_request(self.windows.tokens)

    def window_blocks(self, tiles_per_block: int) -> int:
        """Blocks of a request in layers with a window, where these live in the engine's own blocks."""
        if self.windows is None:
            return 0
        tokens = self.window_page_tokens(tiles_per_block)
        return self.windows.blocks_per_request(self.block_bytes(tiles_per_block), tokens)

    def window_page_tokens(self, tiles_per_block: int) -> int:
        """Tokens of a page of a layer with a window, where these live in the engine's own blocks; 0 if none do."""
        if self.windows is None:
            return 0
        return self.windows.page_tokens(self.block_bytes(tiles_per_block), tiles_per_block * self.preset.tile_tokens)

    def request_blocks(self, context: int, tiles_per_block: int) -> int:
        """Blocks of a running request of so many tokens: records, tail and windows."""
        records = -(-context // (tiles_per_block * self.preset.tile_tokens))
        return records + self.tail_blocks(tiles_per_block) + self.window_blocks(tiles_per_block)

    def best_tiles_per_block(self, context: int) -> int:
        """Return the tiles of a block with which a running request of so many tokens takes few bytes.

        Where few layers hold tiles, a block of one tile would be smaller than a layer's ring. Prefix hits come in whole
        blocks, so a larger one must be worth it.
        """
        sizes = {
            tiles: self.request_blocks(context, tiles) * self.block_bytes(tiles)
            for tiles in range(1, _MOST_TILES_PER_BLOCK + 1)
        }
        enough = min(sizes.values()) * _WORTH_A_LARGER_BLOCK
        return next(tiles for tiles, size in sizes.items() if size <= enough)

    def best_block_tokens(self, context: int, least: int) -> int:
        """Return the tokens of a block, so many at least, with which a request of so many tokens takes few bytes."""
        return max(least, self.best_tiles_per_block(context) * self.preset.tile_tokens)

    def window_page_bytes(self, block_tokens: int) -> int | None:
        """Return the bytes of a page of a layer with a window, where blocks have so many tokens; None if none do."""
        if self.windows is None:
            return None
        return self.window_page_tokens(block_tokens // self.preset.tile_tokens) * self.windows.token_bytes

    def raw_request_bytes(self, context: int) -> int:
        """Bytes of a request of so many tokens with all layers in the model's dtype."""
        windows = 0 if self.windows is None else self.windows.bytes_per_request(context)
        return context * self.raw_bytes_per_token + windows

    def default_max_requests(self, budget_bytes: int) -> int:
        """Return the request limit at which what is fixed takes about a tenth of the budget; at least 1."""
        marginal = self.fixed_bytes(1) - self.fixed_bytes(0)
        return max(1, min(budget_bytes // _TAIL_BUDGET_DIVISOR // marginal, _MAX_DEFAULT_REQUESTS))

    @property
    def break_even_tokens(self) -> int:
        """Tokens a request must hold before it is smaller than in the model dtype."""
        saved = self.raw_bytes_per_token - self.bytes_per_token
        return -(-self.tail_bytes_per_request // saved)


@dataclass(frozen=True, slots=True)
class LatentShape(CacheShape):
    """What one rank caches of a model with multi-head latent attention: one latent, of head_dim channels, a token.

    Args:
        rope_dim: channels of the rope part.
        rope_bits: of the rope part in records, 16 or 8.
    """

    rope_dim: int = 64
    rope_bits: int = 16

    @property
    def layout(self) -> LatentLayout:
        """Layout of a record."""
        return LatentLayout.of(self.preset, self.head_dim, self.rope_dim, self.rope_bits)


def exact_tokens(preset: Preset) -> tuple[int, int]:
    """Return how many newest and how many first tokens stay exact: the preset's, unless the environment says else."""
    if env.canonical():
        return 0, 0
    tail_tokens = env.tail_tokens()
    return (preset.tail_tokens if tail_tokens is None else tail_tokens), preset.sink_tokens


def cache_shape(
    preset: Preset,
    *,
    layers: int,
    kv_heads: int,
    head_dim: int,
    raw_bytes: int,
    draft_tokens: int = 0,
    windows: WindowShape | None = None,
    latent_dims: tuple[int, int] | None = None,
) -> CacheShape:
    """Return what one rank caches, exact tokens taken from preset and environment.

    Args:
        preset: the preset in use.
        layers: as of CacheShape, like all that follow.
        kv_heads: means nothing for latents.
        head_dim: means nothing for latents.
        raw_bytes: of a number.
        draft_tokens: of a step.
        windows: beside tiles.
        latent_dims: channels of the latents and of their rope parts, as of `latent_shape`; None if there are none.
    """
    if latent_dims is not None:
        latent_dim, rope_dim = latent_dims
        return latent_shape(
            preset, layers=layers, latent_dim=latent_dim, rope_dim=rope_dim, raw_bytes=raw_bytes,
            draft_tokens=draft_tokens,
        )  # fmt: skip
    tail_tokens, sink_tokens = exact_tokens(preset)
    return CacheShape(preset, layers, kv_heads, head_dim, raw_bytes, tail_tokens, sink_tokens, draft_tokens, windows)


def latent_shape(
    preset: Preset, *, layers: int, latent_dim: int, rope_dim: int, raw_bytes: int, draft_tokens: int = 0
) -> LatentShape:
    """Return what every rank caches of a model with latents, exact tokens and rope bits as the environment says."""
    return LatentShape(
        preset,
        layers,
        1,
        latent_dim,
        raw_bytes,
        *exact_tokens(preset),
        draft_tokens,
        rope_dim=rope_dim,
        rope_bits=env.rope_bits(),
    )


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """What fits.

    Args:
        tokens: tokens of sealed cache, a multiple of the tile.
        max_requests: requests that may run at once.
        token_bytes: bytes of all records.
        fixed_bytes: bytes of tails, sinks and windows.
        raw_tokens: tokens that the same budget holds in the model dtype, a draft model's rows beside them alike.
    """

    tokens: int
    max_requests: int
    token_bytes: int
    fixed_bytes: int
    raw_tokens: int

    @property
    def ratio(self) -> float:
        """Tokens over those of the model dtype, tails and sinks charged."""
        return self.tokens / self.raw_tokens


def plan_blocks(shape: CacheShape, budget_bytes: int, context: int, tiles_per_block: int = 1) -> int:
    """Return how many requests fit where rings live in the engine's own blocks, as in vLLM.

    Args:
        shape: what one rank caches.
        budget_bytes: bytes for the whole cache on this rank.
        context: tokens of a request.
        tiles_per_block: tiles of a block.
    """
    return budget_bytes // shape.block_bytes(tiles_per_block) // shape.request_blocks(context, tiles_per_block)


def plan_capacity(
    shape: CacheShape, budget_bytes: int, max_requests: int | None = None, draft_bytes: int = 0
) -> CapacityPlan:
    """Size a cache.

    Args:
        shape: what one rank caches.
        budget_bytes: bytes for the whole cache on this rank.
        max_requests: requests that may run at once; None derives the limit from the budget.
        draft_bytes: what a draft model caches of each token beside its records, in a pool of as many pages.

    Raises:
        CapacityError: tails and sinks leave no room for one page beside the padding page.
    """
    requests = shape.default_max_requests(budget_bytes) if max_requests is None else max_requests
    fixed = shape.fixed_bytes(requests)
    page_bytes = shape.page_bytes + shape.preset.tile_tokens * draft_bytes
    pages = (budget_bytes - fixed) // page_bytes - 1
    if pages < 1:
        raise CapacityError(
            f"The KV budget of {budget_bytes} bytes leaves no room for a page of {page_bytes} bytes beside "
            f"{fixed} bytes of exact tails, sinks and windows for {requests} requests. "
            "Lower the request limit or give the cache more memory."
        )
    return CapacityPlan(
        tokens=pages * shape.preset.tile_tokens,
        max_requests=requests,
        token_bytes=(pages + 1) * shape.page_bytes,
        fixed_bytes=fixed,
        raw_tokens=max(1, (budget_bytes - requests * shape.window_bytes) // (shape.raw_bytes_per_token + draft_bytes)),
    )
