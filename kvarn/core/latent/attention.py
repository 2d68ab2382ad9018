"""One layer's attention over the cache of latents: the order of append, seal and attend. What adapters call."""

from collections.abc import Callable

import torch

from kvarn.core.cache import CacheConfig, LayerCache
from kvarn.core.latent.append import rotate_latents, store_latents
from kvarn.core.latent.attend import attend_latents, most_latent_partial_bytes
from kvarn.core.latent.expand import ExpandedHeads
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.prefill import prefill_latents
from kvarn.core.latent.rows import LatentRows
from kvarn.core.latent.seal import seal_latents
from kvarn.core.prefill_plan import LONG_ROWS, PrefillPlan, workspace_tokens
from kvarn.core.step import Step
from kvarn.core.tile_by_tile import attend_by_parts


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
            free. Of the step's first rows, if the others are of long chunks (`expanded_attention`).
        q_rope: [tokens, heads, rope_dim], model dtype.
        rows: the step's latents and rope parts, [tokens, latent_dim] and [tokens, rope_dim].
        layer: the layer's cache.
        step: the forward pass, built once for all layers, for `latent_shape(layout, heads, device)`.
        scale: factor on q . k.
        out: [tokens, heads, latent_dim], model dtype, contiguous: where to write the result; made here if None.

    Returns:
        [tokens, heads, latent_dim], model dtype: mixed latents, for the values' up-projection.

    Raises:
        ValueError: some of these rows are of long chunks, which the step plans to attend otherwise.

    Determinism: bitwise for equal inputs and batch shape. Graph-safe: yes for decode and verify steps.
    """
    if step.plan is not None and q_latent.shape[0] > step.plan.short_tokens:
        raise ValueError(f"Of {q_latent.shape[0]} absorbed queries only {step.plan.short_tokens} are of short chunks.")
    if step.parts:

        def attend(at: torch.Tensor, part: Step) -> torch.Tensor:
            some = LatentRows(rows.latent[at], rows.rope[at])
            return latent_attention(q_latent[at], q_rope[at], some, layer, part, scale)

        return attend_by_parts(step, q_latent, out, attend)
    raw = rotate_latents(rows, layer, step, store=step.rows_in_ring)
    seal_latents(raw, layer, step)
    out, _ = attend_latents(q_latent, q_rope, raw, layer, step, scale, out)
    if not step.rows_in_ring:
        store_latents(raw, layer, step)
    return out


def expanded_attention(
    q: torch.Tensor,
    rows: LatentRows,
    layer: LayerCache[LatentLayout],
    step: Step,
    plan: PrefillPlan,
    heads: ExpandedHeads,
    project: Callable[[torch.Tensor], torch.Tensor],
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Append a step's rows, seal the tiles that they fill, and attend its long chunks to keys and values of all heads.

    If the step has other rows, which come first, `latent_attention` has to follow: the last one to attend stores.

    Args:
        q: [tokens, heads, key width], model dtype, not absorbed, of long chunks; token and head strides are free.
        rows: all of the step's latents and rope parts, [step's tokens, latent_dim] and [step's tokens, rope_dim].
        layer: the layer's cache.
        step: the forward pass.
        plan: its long chunks.
        heads: what latents are expanded to.
        project: as for `ExpandedHeads.expand`.
        scale: factor on q . k.
        out: [tokens, heads, value width], model dtype, contiguous: where to write the result; made here if None.

    Returns:
        [tokens, heads, value width], model dtype.

    Determinism: that of the flash attention. Graph-safe: no.
    """
    raw = rotate_latents(rows, layer, step, store=False)
    # before any row attends: a request may hit a page that another one fills in the same step
    seal_latents(raw, layer, step)
    if out is None:
        out = torch.empty(*q.shape[:2], heads.value_width, dtype=layer.tails.dtype, device=q.device)
    prefill_latents(q, rows, layer, step, plan, lambda found: heads.expand(found, project), scale, out)
    if not plan.short_tokens:
        store_latents(raw, layer, step)
    return out


def latent_scratch_bytes(
    config: CacheConfig[LatentLayout],
    tokens: int,
    requests: int,
    pages: int,
    heads: ExpandedHeads,
    like: torch.Tensor,
    *,
    plans: bool,
) -> int:
    """Return how much memory attention of a step takes at worst, for engines that measure it in a run without a cache.

    Args:
        config: shared numbers of the cache.
        tokens: the most rows of a step.
        requests: the most requests of a step.
        pages: the most pages of a request.
        heads: query heads, and what latents are expanded to for long chunks.
        like: a tensor of the model's dtype and device.
        plans: whether steps come with a plan of their long chunks.
    """
    layout, size = config.layout, like.dtype.itemsize
    short = min(tokens, requests * LONG_ROWS) if plans else tokens
    absorbed = short * heads.count * (layout.row_dim + layout.latent_dim) * size
    absorbed += most_latent_partial_bytes(config, short, requests, pages, heads.count, like.device)
    raw = tokens * layout.row_dim * size
    if not plans:
        return raw + absorbed
    # the own rows expanded, a segment, and what is merged in float32 beside one part
    numbers = heads.token_numbers(layout)
    expanded = (tokens + workspace_tokens(config, like.dtype, numbers)) * numbers * size
    merged = tokens * heads.count * heads.key_width * (size + torch.float32.itemsize)
    return raw + max(absorbed, expanded + merged)
