"""Warm-up of latents: compile every kernel that a server's steps launch, before it serves."""

import torch

from kvarn.core.cache import LayerCache
from kvarn.core.flash import FlashAttention
from kvarn.core.latent.attend import latent_shape
from kvarn.core.latent.attention import expanded_attention, latent_attention
from kvarn.core.latent.expand import ExpandedHeads
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.rows import LatentRows
from kvarn.core.step import Step
from kvarn.core.warm_up import warm_up_steps


def warm_up_latents(layer: LayerCache[LatentLayout], heads: ExpandedHeads, flash: FlashAttention | None) -> None:
    """Run steps of every kind that has kernels of its own, as `warm_up_steps` says.

    Args:
        layer: any of the model's layers, in the memory that the engine gave it.
        heads: query heads of a layer, and what latents are expanded to for long chunks.
        flash: what attends long chunks, if anything does.
    """
    layout = layer.config.layout
    made = heads.count * (heads.key_width - layout.rope_dim + heads.value_width)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=layer.tails.dtype, device=layer.tails.device)

    def run(step: Step, tokens: int) -> None:
        rows = LatentRows(zeros(tokens, layout.latent_dim), zeros(tokens, layout.rope_dim))
        if step.plan is not None:
            q = zeros(tokens, heads.count, heads.key_width)
            expanded_attention(q, rows, layer, step, step.plan, heads, lambda x: zeros(x.shape[0], made), 1.0)
            return
        q_latent, q_rope = (zeros(tokens, heads.count, width) for width in (layout.latent_dim, layout.rope_dim))
        latent_attention(q_latent, q_rope, rows, layer, step, 1.0)

    group, widest = latent_shape(layout, heads.count, layer.records.device)
    warm_up_steps(layer, group, flash, run, widest, heads.token_numbers(layout))
