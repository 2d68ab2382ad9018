"""One layer's attention over the tile cache: the order of append, seal and attend. What both adapters call."""

import torch

from kvarn.core.append import (
    device_signs,
    store_tail,
    store_tail_reference,
)
from kvarn.core.attend import attend, attend_reference, most_partial_rows
from kvarn.core.cache import CacheConfig, LayerCache
from kvarn.core.prefill import prefill, restore_cached
from kvarn.core.prefill_plan import LONG_ROWS, workspace_tokens
from kvarn.core.seal import append_and_seal, append_and_seal_reference
from kvarn.core.step import Step
from kvarn.core.tile_by_tile import attend_by_parts


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: LayerCache,
    step: Step,
    scale: float,
    logit_cap: float = 0.0,
    out: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Append a step's rows, seal the tiles that they fill, and attend.

    Args:
        q: [tokens, q_heads, head_dim], model dtype; token and head strides are free, channels are contiguous.
        k: [tokens, kv_heads, head_dim]; v: the same.
        layer: the layer's cache.
        step: the forward pass, built once for all layers.
        scale: factor on q . k.
        logit_cap: soft cap c of ``c * tanh(x / c)``; 0 for none.
        out: [tokens, q_heads, head_dim], model dtype, contiguous: where to write the result; made here if None.
        sink_logits: [q_heads], any float dtype, contiguous: learned logit of each head's sink, a key with value zero;
            neither scaled nor capped. None for none.

    Returns:
        [tokens, q_heads, head_dim], model dtype.

    Determinism: bitwise for equal inputs and batch shape. Graph-safe: yes for decode and verify steps.
    """
    if step.parts:
        return attend_by_parts(
            step, q, out,
            lambda at, part: attention(q[at], k[at], v[at], layer, part, scale, logit_cap, sink_logits=sink_logits),
        )  # fmt: skip
    plan = step.plan
    restored = restore_cached(k, v, layer, step, plan) if plan is not None and step.restores_first else None
    rotated = append_and_seal(k, v, layer, step)
    if plan is None:
        out, _ = attend(q, rotated, layer, step, scale, logit_cap, out, sink_logits)
    else:
        if plan.short_tokens:
            out, _ = attend(q, rotated, layer, step, scale, logit_cap, out, sink_logits)
        out = prefill(q, k, v, layer, step, plan, scale, logit_cap, out, sink_logits, restored)
    if not step.stores_first:
        store_tail(rotated, layer, step)
    return out


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerCache, step: Step, scale: float,
    logit_cap: float = 0.0, sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Do the same in plain torch, whatever the device; the output in the model dtype."""
    rotated = append_and_seal_reference(k, v, layer, step)
    out, _ = attend_reference(q, rotated, layer, step, scale, logit_cap, sink_logits)
    if not step.rows_in_ring:
        store_tail_reference(rotated, layer, step)
    return out.to(q.dtype)


def reserve_scratch(q: torch.Tensor, config: CacheConfig, requests: int, pages: int, *, plans: bool) -> None:
    """Take and give back as much memory as `attention` needs for these rows at worst, and make its constants.

    For engines that measure their peak of memory in a run without a cache, and then capture graphs.

    Args:
        q: [tokens, q_heads, head_dim], model dtype; the most tokens of a step.
        config: shared numbers of the cache.
        requests: the most requests of a step.
        pages: the most pages of a request.
        plans: whether steps come with a plan of their long chunks.
    """
    tokens, q_heads, head_dim = q.shape
    device_signs(head_dim, q.dtype, q.device, False)
    device_signs(head_dim, torch.float16, q.device, True)
    rotated = 2 * tokens * config.kv_heads * head_dim * q.element_size()
    short = min(tokens, requests * LONG_ROWS) if plans else tokens
    rows = most_partial_rows(config, short, requests, pages, q_heads // config.kv_heads, q.device)
    partial = (rows * (head_dim + 1) + short * q_heads) * torch.float32.itemsize
    restored = 2 * workspace_tokens(config, q.dtype) * config.kv_heads * head_dim * q.element_size()
    # merged in float32, beside one part in the model dtype, with three sums of exponentials
    merged = tokens * q_heads * (head_dim * (torch.float32.itemsize + q.element_size()) + 3 * torch.float32.itemsize)
    needed = max(partial, restored + merged) if plans else partial
    torch.empty(rotated + needed, dtype=torch.uint8, device=q.device)
