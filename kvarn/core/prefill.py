"""Prefill: long chunks attend by flash attention, to their own rows and to cached ones restored to the model dtype."""

from collections.abc import Callable

import torch

from kvarn.core.cache import LayerCache
from kvarn.core.merge import merge, merge_sinks
from kvarn.core.prefill_plan import PrefillPlan, Segment
from kvarn.core.restore import restore
from kvarn.core.step import Step

# So often parts are merged in the model dtype, which rounds each time.
_FEW_MERGES = 2


def prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerCache, step: Step, plan: PrefillPlan, scale: float,
    logit_cap: float, out: torch.Tensor, sink_logits: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Attend the long chunks of a step, before its rows are stored.

    Args:
        q: [tokens, q_heads, head_dim], model dtype; token and head strides are free.
        k: [tokens, kv_heads, head_dim]; v: the same. Not rotated.
        layer: the layer's cache.
        step: the forward pass.
        plan: its long chunks.
        scale: factor on q . k.
        logit_cap: soft cap c of ``c * tanh(x / c)``; 0 for none.
        out: [tokens, q_heads, head_dim], model dtype, contiguous: rows of long chunks are written.
        sink_logits: [q_heads], any float dtype: learned logit of each head's sink; None for none.

    Determinism: that of the flash attention. Graph-safe: no.
    """
    room = (2, most_keys(plan), *k.shape[1:])
    workspace = torch.empty(room, dtype=k.dtype, device=k.device)
    attend_long_chunks(
        q,
        lambda tokens: (k[tokens], v[tokens]),
        lambda segment: restore(layer, step, segment, workspace),
        plan,
        scale,
        logit_cap,
        out,
        sink_logits=sink_logits,
    )


def most_keys(plan: PrefillPlan) -> int:
    """Return the most cached tokens that are restored together."""
    return max((segment.keys for segment in plan.segments), default=0)


def attend_long_chunks(
    q: torch.Tensor,
    own: Callable[[slice], tuple[torch.Tensor, torch.Tensor]],
    cached: Callable[[Segment], tuple[torch.Tensor, torch.Tensor]],
    plan: PrefillPlan,
    scale: float,
    logit_cap: float,
    out: torch.Tensor,
    first_row: int = 0,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Attend long chunks to rows in the model dtype, wherever they come from.

    Queries read their chunk's own rows as they come, and what was cached before as the chunk's first query does.

    Args:
        q: [tokens, q_heads, key width], model dtype, of the step's rows from first_row on; token and head strides are
            free.
        own: returns keys and values of some tokens of the step, [tokens, kv_heads, width].
        cached: returns those of a segment of cached tokens.
        plan: the long chunks.
        scale: factor on q . k.
        logit_cap: soft cap c of ``c * tanh(x / c)``; 0 for none.
        out: [tokens, q_heads, value width], model dtype, contiguous, of the same rows: long chunks' are written.
        first_row: before it, the step has no rows of long chunks.
        sink_logits: [q_heads], any float dtype: learned logit of each head's sink; None for none.
    """
    dtype = out.dtype if len(plan.segments) <= _FEW_MERGES else torch.float32
    total = out if dtype == out.dtype else torch.empty_like(out, dtype=dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    for chunk in plan.own:
        at = _from(first_row, chunk.tokens)
        total[at], lse[:, at] = plan.flash(q[at], *own(chunk.tokens), chunk.spans, scale, logit_cap, causal=True)
    for segment in plan.segments:
        at = _from(first_row, segment.tokens)
        part, part_lse = plan.flash(q[at], *cached(segment), segment.spans, scale, logit_cap, causal=False)
        merge(total[at], lse[:, at], part, part_lse)
    if sink_logits is not None:
        for chunk in plan.own:
            at = _from(first_row, chunk.tokens)
            merge_sinks(total[at], lse[:, at], sink_logits)
    if total is not out:
        for chunk in plan.own:
            at = _from(first_row, chunk.tokens)
            out[at] = total[at]


def _from(first_row: int, tokens: slice) -> slice:
    return slice(tokens.start - first_row, tokens.stop - first_row)
