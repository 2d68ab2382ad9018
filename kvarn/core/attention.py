"""One layer's attention over the tile cache: the order of append, seal and attend. What both adapters call."""

import torch

from kvarn.core.append import rotate_rows, store_tail
from kvarn.core.attend import attend
from kvarn.core.cache import LayerCache
from kvarn.core.seal import seal
from kvarn.core.step import Step


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: LayerCache,
    step: Step,
    scale: float,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """Append a step's rows, seal the tiles that they fill, and attend.

    Args:
        q: [tokens, q_heads, head_dim], model dtype; token and head strides are free, channels are contiguous.
        k: [tokens, kv_heads, head_dim]; v: the same.
        layer: the layer's cache.
        step: the forward pass, built once for all layers.
        scale: factor on q . k.
        logit_cap: soft cap c of ``c * tanh(x / c)``; 0 for none.

    Returns:
        [tokens, q_heads, head_dim], model dtype.

    Determinism: bitwise for equal inputs and batch shape. Graph-safe: yes for decode steps.
    """
    rotated = rotate_rows(q, k, v, layer, step, store=step.rows_in_ring)
    seal(rotated, layer, step)
    out, _ = attend(rotated, layer, step, scale, logit_cap)
    if not step.rows_in_ring:
        store_tail(rotated, layer, step)
    return out
