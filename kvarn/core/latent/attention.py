"""One layer's attention over the cache of latents: the order of append, seal and attend. What adapters call."""

import torch

from kvarn.core.cache import LayerCache
from kvarn.core.latent.append import rotate_latents, store_latents
from kvarn.core.latent.attend import attend_latents
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.rows import LatentRows
from kvarn.core.latent.seal import seal_latents
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
            free.
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
