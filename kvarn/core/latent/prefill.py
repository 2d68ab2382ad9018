"""Prefill of latents: long chunks attend by flash attention, to keys and values that are made from latents for it."""

from collections.abc import Callable

import torch

from kvarn.core.cache import LayerCache
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.restore import restore_latents
from kvarn.core.latent.rows import LatentRows
from kvarn.core.prefill import attend_long_chunks
from kvarn.core.prefill_plan import PrefillPlan
from kvarn.core.step import Step


def prefill_latents(
    q: torch.Tensor,
    rows: LatentRows,
    layer: LayerCache[LatentLayout],
    step: Step,
    plan: PrefillPlan,
    expand: Callable[[LatentRows], tuple[torch.Tensor, torch.Tensor]],
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend the long chunks of a step, its tiles sealed but its rows not stored yet.

    Args:
        q: [tokens, heads, key width], model dtype, not absorbed, of the rows after those of short requests; token and
            head strides are free.
        rows: the step's latents and rope parts.
        layer: the layer's cache.
        step: the forward pass.
        plan: its long chunks, which come last.
        expand: makes keys [rows, heads, key width] and values [rows, heads, value width] of rows: the model's
            up-projection.
        scale: factor on q . k.
        out: [tokens, heads, value width], model dtype, contiguous, of the same rows; written.

    Determinism: that of the flash attention. Graph-safe: no.
    """
    room = (plan.most_restored, layer.config.layout.row_dim)
    workspace = torch.empty(room, dtype=rows.latent.dtype, device=rows.latent.device)
    attend_long_chunks(
        q,
        lambda tokens: expand(LatentRows(rows.latent[tokens], rows.rope[tokens])),
        lambda segment: expand(restore_latents(rows, layer, step, segment, workspace)),
        plan,
        scale,
        0.0,
        out,
        plan.short_tokens,
    )
