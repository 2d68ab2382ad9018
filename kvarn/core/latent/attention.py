"""One layer's attention over the cache of latents: the order of append, seal and attend. What adapters call."""

import torch

from kvarn.core.cache import CacheConfig, LayerCache
from kvarn.core.latent.append import rotate_latents, store_latents
from kvarn.core.latent.attend import attend_latents, most_latent_partial_bytes
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.rows import LatentRows
from kvarn.core.latent.seal import seal_latents
from kvarn.core.prefill_plan import LONG_ROWS, workspace_tokens
from kvarn.core.step import Step


def latent_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    rows: LatentRows,
    layer: LayerCache[LatentLayout],
    step: Step,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Append a step's rows, seal the tiles that they fill, and attend.

    Args:
        q_latent: [tokens, heads, latent_dim], model dtype, keys' up-projection absorbed; token and head strides are
            free. Of the step's first rows, if the others are of long chunks (`prefill_latents`).
        q_rope: [tokens, heads, rope_dim], model dtype.
        rows: the step's latents and rope parts, [tokens, latent_dim] and [tokens, rope_dim].
        layer: the layer's cache.
        step: the forward pass, built once for all layers, with groups of `heads_together(heads)`.
        scale: factor on q . k.
        out: [tokens, heads, latent_dim], model dtype, contiguous: where to write the result; made here if None.

    Returns:
        [tokens, heads, latent_dim], model dtype: mixed latents, for the values' up-projection.

    Determinism: bitwise for equal inputs and batch shape. Graph-safe: yes for decode and verify steps.
    """
    raw = rotate_latents(rows, layer, step, store=step.rows_in_ring)
    seal_latents(raw, layer, step)
    out, _ = attend_latents(q_latent, q_rope, raw, layer, step, scale, out)
    if not step.rows_in_ring:
        store_latents(raw, layer, step)
    return out


def append_latents(rows: LatentRows, layer: LayerCache[LatentLayout], step: Step) -> None:
    """Append a step's rows and seal the tiles that they fill; all were attended to by `prefill_latents`."""
    raw = rotate_latents(rows, layer, step, store=False)
    seal_latents(raw, layer, step)
    store_latents(raw, layer, step)


def latent_scratch_bytes(
    config: CacheConfig[LatentLayout],
    tokens: int,
    requests: int,
    pages: int,
    heads: int,
    like: torch.Tensor,
    token_numbers: int | None,
) -> int:
    """Return how much memory attention of a step takes at worst, for engines that measure it in a run without a cache.

    Args:
        config: shared numbers of the cache.
        tokens: the most rows of a step.
        requests: the most requests of a step.
        pages: the most pages of a request.
        heads: query heads of a layer on this rank.
        like: a tensor of the model's dtype and device.
        token_numbers: what a token of long chunks takes, restored and expanded; None if no chunk is long.
    """
    layout, size = config.layout, like.dtype.itemsize
    short = tokens if token_numbers is None else min(tokens, requests * LONG_ROWS)
    absorbed = short * heads * (layout.row_dim + layout.latent_dim) * size
    absorbed += most_latent_partial_bytes(config, short, requests, pages, heads, like.device)
    raw = tokens * layout.row_dim * size
    if token_numbers is None:
        return raw + absorbed
    # the own rows expanded, a segment, and what is merged in float32 beside one part
    expanded = (tokens + workspace_tokens(config, like.dtype, token_numbers)) * token_numbers * size
    merged = tokens * token_numbers * (size + torch.float32.itemsize)
    return raw + max(absorbed, expanded + merged)
