"""Prefill: long chunks attend by flash attention, to their own rows and to cached ones restored to the model dtype."""

import torch

from kvarn.core.cache import LayerCache
from kvarn.core.merge import merge
from kvarn.core.prefill_plan import PrefillPlan
from kvarn.core.restore import restore
from kvarn.core.step import Step

# So often parts are merged in the model dtype, which rounds each time.
_FEW_MERGES = 2


def prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerCache, step: Step, plan: PrefillPlan, scale: float,
    logit_cap: float, out: torch.Tensor,
) -> None:  # fmt: skip
    """Attend the long chunks of a step, before its rows are stored.

    Queries read their chunk's own rows as they come, and what was cached before as the chunk's first query does.

    Args:
        q: [tokens, q_heads, head_dim], model dtype; token and head strides are free.
        k: [tokens, kv_heads, head_dim]; v: the same. Not rotated.
        layer: the layer's cache.
        step: the forward pass.
        plan: its long chunks.
        scale: factor on q . k.
        logit_cap: soft cap c of ``c * tanh(x / c)``; 0 for none.
        out: [tokens, q_heads, head_dim], model dtype, contiguous: rows of long chunks are written.

    Determinism: that of the flash attention. Graph-safe: no.
    """
    dtype = out.dtype if len(plan.segments) <= _FEW_MERGES else torch.float32
    total = out if dtype == out.dtype else torch.empty_like(out, dtype=dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    for own in plan.own:
        at = own.tokens
        total[at], lse[:, at] = plan.flash(q[at], k[at], v[at], own.spans, scale, logit_cap, causal=True)
    room = (2, max((segment.keys for segment in plan.segments), default=0), *k.shape[1:])
    workspace = torch.empty(room, dtype=k.dtype, device=k.device)
    for segment in plan.segments:
        at = segment.tokens
        keys, values = restore(layer, step, segment, workspace)
        part, part_lse = plan.flash(q[at], keys, values, segment.spans, scale, logit_cap, causal=False)
        merge(total[at], lse[:, at], part, part_lse)
    if total is not out:
        for own in plan.own:
            out[own.tokens] = total[own.tokens]
