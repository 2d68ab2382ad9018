"""Warm-up of latents: compile every kernel that a server's steps launch, before it serves."""

import torch

from kvarn.core.cache import LayerCache
from kvarn.core.flash import FlashAttention
from kvarn.core.latent.attend import LATENT_COLUMNS, heads_together
from kvarn.core.latent.attention import append_latents, latent_attention
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.prefill import prefill_latents
from kvarn.core.latent.rows import LatentRows
from kvarn.core.step import Step
from kvarn.core.warm_up import warm_up_steps


def warm_up_latents(
    layer: LayerCache[LatentLayout],
    heads: int,
    widths: tuple[int, int],
    flash: FlashAttention | None,
    token_numbers: int | None,
) -> None:
    """Run steps of every kind that has kernels of its own, as `warm_up_steps` says.

    Args:
        layer: any of the model's layers, in the memory that the engine gave it.
        heads: query heads of a layer on this rank.
        widths: channels of a head's keys and of its values, which long chunks attend to.
        flash: what attends long chunks, if anything does.
        token_numbers: as for `plan_prefill`.
    """
    layout = layer.config.layout

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=layer.tails.dtype, device=layer.tails.device)

    def expand(rows: LatentRows) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (zeros(rows.latent.shape[0], heads, width) for width in widths)
        return keys, values

    def run(step: Step, tokens: int) -> None:
        rows = LatentRows(zeros(tokens, layout.latent_dim), zeros(tokens, layout.rope_dim))
        if step.plan is not None:
            q, out = (zeros(tokens, heads, width) for width in widths)
            prefill_latents(q, rows, layer, step, step.plan, expand, 1.0, out)
            append_latents(rows, layer, step)
            return
        q_latent, q_rope = zeros(tokens, heads, layout.latent_dim), zeros(tokens, heads, layout.rope_dim)
        latent_attention(q_latent, q_rope, rows, layer, step, 1.0)

    warm_up_steps(layer, heads_together(heads), flash, run, LATENT_COLUMNS, token_numbers)
