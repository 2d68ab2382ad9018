"""Learned sinks for attention that is torch's own: layers with a window where no kernel serves them."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def sdpa_with_sinks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    sink_logits: torch.Tensor,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Attend by ``scaled_dot_product_attention``, with a key and a value of zeros more, whose logit the mask brings.

    Args:
        q: [batch, q_heads, queries, head_dim].
        k: [batch, kv_heads, keys, head_dim]; v: the same.
        attn_mask: bool, broadcast to [batch, q_heads, queries, keys]: what a query sees; None for all.
        sink_logits: [q_heads], any float dtype: learned logit of each head's sink; not scaled.
        is_causal: query i sees the first i + 1 keys, if there is no mask.
        options: others of ``scaled_dot_product_attention``.

    Returns:
        [batch, q_heads, queries, head_dim].
    """
    batch, heads, queries, _ = q.shape
    seen = torch.ones(queries, k.shape[2], dtype=torch.bool, device=q.device) if attn_mask is None else attn_mask
    if is_causal and attn_mask is None:
        seen = seen.tril()
    bias = q.new_zeros(batch, heads, *seen.shape[-2:]).masked_fill(~seen, -torch.inf)
    sink = sink_logits.to(q.dtype).view(1, heads, 1, 1).expand(batch, heads, queries, 1)
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
    mask = torch.cat((bias, sink), dim=-1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def taking_sinks(forward: Callable[..., torch.Tensor], module: Any) -> Callable[..., torch.Tensor]:
    """Return a function that takes learned sinks beside what another takes, as ``sinks``; None for none.

    Args:
        forward: attends by the module's ``scaled_dot_product_attention``, with no options but those of its mask, scale
            and groups.
        module: where it finds that.
    """

    @functools.wraps(forward)
    def attend(*args: Any, sinks: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        if sinks is None:
            return forward(*args, **options)
        without = module.scaled_dot_product_attention
        module.scaled_dot_product_attention = functools.partial(sdpa_with_sinks, sink_logits=sinks)
        try:
            return forward(*args, **options)
        finally:
            module.scaled_dot_product_attention = without

    return attend
