"""Rows of latents as they come, as they are stored raw, and where a request's stand."""

from typing import NamedTuple

import torch

from kvarn.core.cache import LayerCache
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.step import Step


class LatentRows(NamedTuple):
    """Rows of some tokens.

    Args:
        latent: [..., tokens, latent_dim].
        rope: [..., tokens, rope_dim], turned by its position.
    """

    latent: torch.Tensor
    rope: torch.Tensor


def split_rows(rows: torch.Tensor, layout: LatentLayout) -> LatentRows:
    """Split rows [..., row_dim] into latents and rope parts."""
    return LatentRows(rows[..., : layout.latent_dim], rows[..., layout.latent_dim :])


def raw_rows(
    raw: torch.Tensor, layer: LayerCache[LatentLayout], step: Step, request: int, begin: int, end: int
) -> torch.Tensor:
    """Return the raw rows of some positions of a request, from its ring or from the step's own.

    Args:
        raw: the step's rows, [tokens, 1, row_dim].
        layer: the layer's cache.
        step: the forward pass.
        request: index in the step.
        begin: first position; end: the one after the last.

    Returns:
        [positions, row_dim], dtype of the ring.
    """
    prefix = int(step.prefix_lens[request])
    ring_end = int(step.seq_lens[request]) if step.rows_in_ring else prefix
    at = torch.arange(begin, end, device=raw.device)
    ring = layer.tails[int(step.rows[request]), 0, 0, at[at < ring_end] % layer.config.ring_tokens]
    fresh = raw[at[at >= ring_end] - prefix + int(step.query_start[request]), 0]
    return torch.cat((ring, fresh.to(ring.dtype)))
