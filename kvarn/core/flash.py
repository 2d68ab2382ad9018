"""Flash attention over rows in the model dtype, which long chunks of a prefill borrow from torch or from an engine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvarn.core.cache import CacheConfig
from kvarn.core.reference import softmax_attention

_WIDEST_HEAD = 256
# On this capability, this version of FlashAttention takes values narrower than keys, if they have such widths: more
# channels than the first number, no more than the second.
_VERSION, _HOPPER = 3, 9
_WIDE_KEYS, _NARROW_VALUES = (128, 192), (96, 128)


@dataclass(frozen=True, slots=True)
class Spans:
    """Where queries and keys of each request of one call stand.

    Args:
        query_start: [requests + 1], int32, on the device: first query of each request.
        key_start: [requests + 1], int32, on the device: first key of each request.
        most_queries: of a request.
        most_keys: of a request.
    """

    query_start: torch.Tensor
    key_start: torch.Tensor
    most_queries: int
    most_keys: int


class FlashAttention(Protocol):
    """Attention of every request's queries to its own keys."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scale: float, logit_cap: float, *,
        causal: bool, out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Attend.

        Args:
            q: [queries, q_heads, head_dim], model dtype; token and head strides are free.
            k: [keys, kv_heads, head_dim].
            v: [keys, kv_heads, value width], no wider.
            spans: which rows are whose.
            scale: factor on q . k.
            logit_cap: soft cap c of ``c * tanh(x / c)``; 0 for none.
            causal: the queries are the request's newest tokens, and see no later ones.
            out: [queries, q_heads, value width], model dtype, contiguous: where to write the output; made here if None.

        Returns:
            Output [queries, q_heads, value width], model dtype; and natural log-sum-exp [q_heads, queries], float32.
        """


def flash_for(
    config: CacheConfig[Any], dtype: torch.dtype, device: torch.device, *, caps_logits: bool,
    engine: FlashAttention | None = None, head_dim: int | None = None,
) -> FlashAttention | None:  # fmt: skip
    """Return what attends long chunks, or None if the kernels over tiles are to.

    These are slower there, but do what no other does: read tiles of the chunk itself (canonical), keep a row's bits
    whatever is in the batch, and take float32 and the widest heads.

    Args:
        config: shared numbers of the cache.
        dtype: of the model.
        device: where it runs.
        caps_logits: some layer has a soft cap, which torch's own doesn't know.
        engine: the engine's own flash attention, if it has one that runs here; it must know soft caps.
        head_dim: channels of a head, if they are not those of the layout.
    """
    if config.canonical or config.batch_invariant:
        return None
    if device.type != "cuda":
        return flash_reference
    if dtype == torch.float32 or (head_dim or config.layout.head_dim) > _WIDEST_HEAD:
        return None
    if engine is not None:
        return engine
    return None if caps_logits or torch.version.hip is not None else widened(torch_flash)


def flash_from(varlen: Callable[..., Any], *, version: int, **options: Any) -> FlashAttention:
    """Return flash attention by a function with the arguments of FlashAttention's ``flash_attn_varlen_func``.

    Args:
        varlen: the function; it must return log-sum-exps if asked to, and write its output where it is told.
        version: of FlashAttention.
        options: arguments that this variant of it takes beside the usual ones.
    """

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scale: float, logit_cap: float, *,
        causal: bool, out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        out, lse, *_ = varlen(
            q, k, v, cu_seqlens_q=spans.query_start, cu_seqlens_k=spans.key_start, max_seqlen_q=spans.most_queries,
            max_seqlen_k=spans.most_keys, softmax_scale=scale, softcap=logit_cap, causal=causal,
            return_softmax_lse=True, out=out, **options,
        )  # fmt: skip
        return out, lse

    return widened(attend, takes_narrow=version == _VERSION)


def widened(flash: FlashAttention, *, takes_narrow: bool = False) -> FlashAttention:
    """Return flash attention for values narrower than keys, by one that takes none such, or only some.

    Args:
        flash: attends to keys and values of one width.
        takes_narrow: it is FlashAttention 3, which takes some that are narrower on Hopper.
    """

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scale: float, logit_cap: float, *,
        causal: bool, out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        width = v.shape[-1]
        if width == k.shape[-1] or (takes_narrow and _takes(k, v)):
            return flash(q, k, v, spans, scale, logit_cap, causal=causal, out=out)
        wide = torch.nn.functional.pad(v, (0, k.shape[-1] - width))
        found, lse = flash(q, k, wide, spans, scale, logit_cap, causal=causal)
        return (found[..., :width].contiguous() if out is None else out.copy_(found[..., :width])), lse

    return attend


def _takes(k: torch.Tensor, v: torch.Tensor) -> bool:
    pairs = ((k.shape[-1], _WIDE_KEYS), (v.shape[-1], _NARROW_VALUES))
    fits = all(more < width <= most for width, (more, most) in pairs)
    return fits and torch.cuda.get_device_capability(k.device)[0] == _HOPPER


def torch_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scale: float, logit_cap: float, *,
    causal: bool, out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attend by FlashAttention 2 as torch ships it, to keys and values of one width.

    By the operator: the public function can't share keys in groups in every version of torch that engines pin.

    Raises:
        ValueError: with a soft cap.
    """
    if logit_cap:
        raise ValueError("torch's flash attention has no soft cap.")
    found, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, spans.query_start, spans.key_start, spans.most_queries, spans.most_keys, 0.0, causal, False,
        scale=scale,
    )  # fmt: skip
    return (found if out is None else out.copy_(found)), lse


def flash_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scale: float, logit_cap: float, *,
    causal: bool, out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attend in plain torch, request by request, in float32."""
    outs, lses = [], []
    bounds = (spans.query_start.tolist(), spans.key_start.tolist())
    for q_begin, q_end, k_begin, k_end in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:], strict=False):
        queries, keys = q_end - q_begin, k_end - k_begin
        visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        if causal:
            visible = visible.tril(keys - queries)
        # copies, because a product's bits depend on where its operands lie
        own_q, own_k, own_v = (
            x.to(torch.float32, copy=True).contiguous() for x in (q[q_begin:q_end], k[k_begin:k_end], v[k_begin:k_end])
        )
        one, lse = softmax_attention(own_q, own_k, own_v, visible, scale, logit_cap)
        outs.append(one.to(q.dtype))
        lses.append(lse.T)
    return torch.cat(outs, out=out), torch.cat(lses, dim=1)
