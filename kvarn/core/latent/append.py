"""Rotate a step's latents and store what stays exact: the first rows in a sink slot, the newest in the tail ring."""

import torch

from kvarn.core.append import RAW_MAX, launch_store, store_first_reference, store_rows_reference
from kvarn.core.cache import LayerCache, runs_triton
from kvarn.core.hadamard import rotate
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.rows import LatentRows
from kvarn.core.launch import chained, launch
from kvarn.core.step import Step

# Rows of one program.
_BLOCK = 4
_ELEMENTS_PER_WARP = 512


def rotate_latents(rows: LatentRows, layer: LayerCache[LatentLayout], step: Step, *, store: bool) -> torch.Tensor:
    """Rotate a step's latents, and write the first rows to sinks, as `rotate_rows` does; with `store`, also to rings.

    Args:
        rows: latents [tokens, latent_dim], normalised as the model caches them, and rope parts [tokens, rope_dim];
            model dtype, token strides are free.
        layer: the layer's cache.
        step: the forward pass.
        store: write rings in the same launch. Right only if no query of the step reads a row that they push out.

    Returns:
        Raw rows, [tokens, 1, row_dim], model dtype: latents rotated, then rope parts.

    Determinism: a row's bits depend on that row alone. Graph-safe: yes.
    """
    if not runs_triton(rows.latent):
        raw = rotate_latents_reference(rows)
        store_first_reference(raw[:, None], layer, step, store=store)
        return raw
    from kvarn.core.kernels.latent.rotate import rotate_latents_kernel

    layout = layer.config.layout
    tokens = rows.latent.shape[0]
    raw = torch.empty(tokens, 1, layout.row_dim, dtype=layer.tails.dtype, device=rows.latent.device)
    launch(
        rotate_latents_kernel, (-(-tokens // _BLOCK),),
        rows.latent, rows.rope, raw, layer.tails, layer.sinks, step.token_request, step.token_position, step.rows,
        step.sink_slots, tokens, rows.latent.stride(0), rows.rope.stride(0), layer.tails.stride(0),
        layer.sinks.stride(0), LATENT=layout.latent_dim, ROPE=layout.rope_dim, NORM=layer.config.rotation_norm,
        RING=layer.config.ring_tokens, SINK=layer.config.sink_tokens, STORE=store, BLOCK=_BLOCK,
        **chained(raw.device), num_warps=_warps(layout),
    )  # fmt: skip
    return raw


def rotate_latents_reference(rows: LatentRows) -> torch.Tensor:
    """Rotate in float32 and round to the rows' dtype."""
    raw = torch.cat((rotate(rows.latent), rows.rope.float()), dim=-1)
    return raw.clamp(-RAW_MAX, RAW_MAX).to(rows.latent.dtype)[:, None]


def store_latents(raw: torch.Tensor, layer: LayerCache[LatentLayout], step: Step) -> None:
    """Store the rows of a chunk that rings keep, after the chunk was attended to.

    Determinism: bitwise. Graph-safe: yes.
    """
    if runs_triton(raw):
        launch_store(raw, raw, layer, step)
    else:
        store_latents_reference(raw, layer, step)


def store_latents_reference(raw: torch.Tensor, layer: LayerCache[LatentLayout], step: Step) -> None:
    """Store rows in plain torch."""
    store_rows_reference(raw[:, None], layer, step)


def rotate_queries(
    q_latent: torch.Tensor, q_rope: torch.Tensor, layout: LatentLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate absorbed queries and divide each by a power of two that keeps it inside fp16.

    Args:
        q_latent: [tokens, heads, latent_dim]; token and head strides are free.
        q_rope: [tokens, heads, rope_dim].
        layout: widths.

    Returns:
        Queries [tokens, heads, row_dim], fp16: latent part, then rope part; and what each was divided by,
        [tokens, heads], float32. For the kernels alone.
    """
    from kvarn.core.kernels.latent.rotate import rotate_queries_kernel

    tokens, heads = q_latent.shape[:2]
    q = torch.empty(tokens, heads, layout.row_dim, dtype=torch.float16, device=q_latent.device)
    unit = torch.empty(tokens, heads, dtype=torch.float32, device=q_latent.device)
    launch(
        rotate_queries_kernel, (-(-tokens * heads // _BLOCK),),
        q_latent, q_rope, q, unit, tokens * heads, heads, *q_latent.stride()[:2], *q_rope.stride()[:2],
        LATENT=layout.latent_dim, ROPE=layout.rope_dim, NORM=layout.latent_dim**-0.5, BLOCK=_BLOCK,
        **chained(q.device), num_warps=_warps(layout),
    )  # fmt: skip
    return q, unit


def _warps(layout: LatentLayout) -> int:
    return max(1, min(4, _BLOCK * layout.latent_dim // _ELEMENTS_PER_WARP))
