"""Prefill: long chunks attend by flash attention, to their own rows and to cached ones restored to the model dtype."""

from collections.abc import Callable
from functools import partial

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
    logit_cap: float, out: torch.Tensor | None = None, sink_logits: torch.Tensor | None = None,
    restored: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attend the long chunks of a step, before its rows are stored, unless what is cached was restored before.

    Args:
        q: [tokens, q_heads, head_dim], model dtype; token and head strides are free.
        k: [tokens, kv_heads, head_dim]; v: the same. Not rotated.
        layer: the layer's cache.
        step: the forward pass.
        plan: its long chunks.
        scale: factor on q . k.
        logit_cap: soft cap c of ``c * tanh(x / c)``; 0 for none.
        out: [tokens, q_heads, head_dim], model dtype, contiguous: rows of long chunks are written; made here if None.
        sink_logits: [q_heads], any float dtype: learned logit of each head's sink; None for none.
        restored: what `restore_cached` returned, where the step restores first.

    Returns:
        [tokens, q_heads, head_dim], model dtype.

    Determinism: that of the flash attention. Graph-safe: no.
    """
    found = (lambda _: restored) if restored else partial(restore, k, v, layer, step, out=_workspace(k, plan))
    return attend_long_chunks(
        q,
        lambda tokens: (k[tokens], v[tokens]),
        found,
        plan,
        scale,
        logit_cap,
        out,
        sink_logits=sink_logits,
    )


def restore_cached(
    k: torch.Tensor, v: torch.Tensor, layer: LayerCache, step: Step, plan: PrefillPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Restore what a step attends to that restores first, before it changes the cache.

    Args:
        k: [tokens, kv_heads, head_dim]; v: the same. Not rotated.
        layer: the layer's cache.
        step: the forward pass.
        plan: its long chunks.

    Returns:
        Keys and values, as of `restore`.
    """
    return restore(k, v, layer, step, plan.segments[0], _workspace(k, plan))


def _workspace(k: torch.Tensor, plan: PrefillPlan) -> torch.Tensor:
    return torch.empty((2, plan.most_restored, *k.shape[1:]), dtype=k.dtype, device=k.device)


def attend_long_chunks(
    q: torch.Tensor,
    own: Callable[[slice], tuple[torch.Tensor, torch.Tensor]],
    restored: Callable[[Segment], tuple[torch.Tensor, torch.Tensor]],
    plan: PrefillPlan,
    scale: float,
    logit_cap: float,
    out: torch.Tensor | None = None,
    first_row: int = 0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend long chunks to rows in the model dtype, wherever they come from.

    Queries read their chunk's own rows as they come, and what was cached before as the chunk's first query does.

    Args:
        q: [tokens, q_heads, key width], model dtype, of the step's rows from first_row on; token and head strides are
            free.
        own: returns keys and values of some tokens of the step, [tokens, kv_heads, width].
        restored: returns those of a segment that begins with cached tokens.
        plan: the long chunks.
        scale: factor on q . k.
        logit_cap: soft cap c of ``c * tanh(x / c)``; 0 for none.
        out: [tokens, q_heads, value width], model dtype, contiguous, of the same rows: long chunks' are written; None
            to make it here, where values are as wide as keys.
        first_row: before it, the step has no rows of long chunks.
        sink_logits: [q_heads], any float dtype: learned logit of each head's sink; None for none.

    Returns:
        [tokens, q_heads, value width], model dtype, of the same rows.
    """

    def part_of(segment: Segment, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = restored(segment) if segment.restored else own(segment.tokens)
        queries = q[_from(first_row, segment.tokens)]
        return plan.flash(queries, keys, values, segment.spans, scale, logit_cap, causal=segment.causal, out=out)

    only = plan.segments[0]
    if only.tokens.stop - only.tokens.start == q.shape[0] and len(plan.segments) == 1 and sink_logits is None:
        return part_of(only, out)[0]
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    merges = sum(not segment.opens for segment in plan.segments)
    total = out if merges <= _FEW_MERGES else torch.empty_like(out, dtype=torch.float32)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    for segment in plan.segments:
        at = _from(first_row, segment.tokens)
        _add_part(part_of, segment, total[at], lse[:, at], merged_in_place=total is out)
    for at in (_from(first_row, segment.tokens) for segment in plan.segments if segment.opens):
        if sink_logits is not None:
            merge_sinks(total[at], lse[:, at], sink_logits)
        if total is not out:
            out[at] = total[at]
    return out


def _add_part(
    part_of: Callable[[Segment, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]],
    segment: Segment,
    total: torch.Tensor,
    lse: torch.Tensor,
    *,
    merged_in_place: bool,
) -> None:
    """Attend a segment and merge it with what its chunks attended to before. Its output is freed on return."""
    if segment.opens and merged_in_place:
        lse[:] = part_of(segment, total)[1]
        return
    part, part_lse = part_of(segment, None)
    if segment.opens:
        total[:], lse[:] = part, part_lse
    else:
        merge(total, lse, part, part_lse)


def _from(first_row: int, tokens: slice) -> slice:
    return slice(tokens.start - first_row, tokens.stop - first_row)
