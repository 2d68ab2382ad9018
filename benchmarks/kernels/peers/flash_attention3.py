"""FlashAttention 3 over 16-bit or fp8 blocks, as SGLang or vLLM ship it. Over fp8 it computes in fp8."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.kernels.inputs import Inputs
from benchmarks.kernels.operation import Operation
from benchmarks.kernels.peers.paged import FP8, TOLERANCE, PagedCache, paged_cache

# Queries and weights are rounded to 3 bits.
_FP8_TOLERANCE = 0.15


def operations(inputs: Inputs, l2_bytes: int, kind: str, hollow: bool) -> Iterator[Operation]:
    """Yield FlashAttention 3; see `registry.operations`."""
    make = _from_sglang_kernel() or _from_vllm()
    case = inputs.case
    cache = paged_cache(inputs, l2_bytes, FP8 if kind == "fp8" else inputs.q.dtype, hollow)
    q = inputs.q.to(cache.keys[0].dtype)
    descale = torch.ones(case.batch, case.kv_heads, dtype=torch.float32, device=inputs.device)
    scales = {f"{name}_descale": descale for name in "qkv"} if kind == "fp8" else {}
    run = make(inputs, cache, q, scales)
    tolerance = _FP8_TOLERANCE if kind == "fp8" else TOLERANCE[inputs.q.dtype]
    yield Operation(f"fa3-{kind}", cache.copies, run, lambda: cache.error(run(0)), tolerance)


_Make = Callable[[Inputs, PagedCache, torch.Tensor, dict[str, torch.Tensor]], Callable[[int], torch.Tensor]]


def _from_sglang_kernel() -> _Make | None:
    try:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None

    def make(inputs: Inputs, cache: PagedCache, q: torch.Tensor, scales: dict) -> Callable[[int], torch.Tensor]:
        case, seq_lens = inputs.case, inputs.seq_lens()
        rows = q.unflatten(0, (case.batch, case.q_len))

        def run(copy: int) -> torch.Tensor:
            return flash_attn_with_kvcache(
                rows, cache.keys[copy], cache.values[copy], cache_seqlens=seq_lens, page_table=cache.table,
                softmax_scale=inputs.scale, causal=True, softcap=case.logit_cap, **scales,
            ).flatten(0, 1)  # fmt: skip

        return run

    return make


def _from_vllm() -> _Make:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    def make(inputs: Inputs, cache: PagedCache, q: torch.Tensor, scales: dict) -> Callable[[int], torch.Tensor]:
        case, seq_lens = inputs.case, inputs.seq_lens()
        query_start = cache.indptr([case.q_len] * case.batch)

        def run(copy: int) -> torch.Tensor:
            return flash_attn_varlen_func(
                q, cache.keys[copy], cache.values[copy], max_seqlen_q=case.q_len, cu_seqlens_q=query_start,
                max_seqlen_k=max(case.seq_lens), seqused_k=seq_lens, softmax_scale=inputs.scale, causal=True,
                softcap=case.logit_cap, block_table=cache.table, fa_version=3, **scales,
            )  # fmt: skip

        return run

    return make
