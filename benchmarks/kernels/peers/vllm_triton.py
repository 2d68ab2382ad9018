"""vLLM's Triton unified attention over 16-bit or fp8 blocks. Over fp8 it computes in the model dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.kernels.inputs import Inputs
from benchmarks.kernels.operation import Operation
from benchmarks.kernels.peers.paged import FP8, TOLERANCE, paged_cache

# As the backend sets them: smaller batches split their contexts, into that many segments.
_LAUNCH_GRID = 128
_SEGMENTS = 16


def operations(inputs: Inputs, l2_bytes: int, kind: str, hollow: bool) -> Iterator[Operation]:
    """Yield vLLM's kernel; see `registry.operations`."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    case, device = inputs.case, inputs.device
    cache = paged_cache(inputs, l2_bytes, FP8 if kind == "fp8" else inputs.q.dtype, hollow)
    padded = 1 << (case.head_dim - 1).bit_length()
    segments = (case.batch, case.q_heads, _SEGMENTS)
    partial = torch.empty(*segments, padded, dtype=torch.float32, device=device)
    largest, total = (torch.empty(segments, dtype=torch.float32, device=device) for _ in range(2))
    descale = torch.ones(1, dtype=torch.float32, device=device).expand(case.batch, case.kv_heads)
    query_start = cache.indptr([case.q_len] * case.batch)
    seq_lens = inputs.seq_lens()
    out = torch.empty_like(inputs.q)

    def run(copy: int) -> torch.Tensor:
        unified_attention(
            q=inputs.q, k=cache.keys[copy], v=cache.values[copy], out=out, cu_seqlens_q=query_start,
            max_seqlen_q=case.q_len, seqused_k=seq_lens, max_seqlen_k=max(case.seq_lens),
            softmax_scale=inputs.scale, causal=True, window_size=(-1, -1), block_table=cache.table,
            softcap=case.logit_cap, q_descale=None, k_descale=descale, v_descale=descale,
            seq_threshold_3D=_LAUNCH_GRID // case.kv_heads, num_par_softmax_segments=_SEGMENTS,
            softmax_segm_output=partial, softmax_segm_max=largest, softmax_segm_expsum=total,
            kv_quant_mode=KVQuantMode.FP8_PER_TENSOR if kind == "fp8" else KVQuantMode.NONE,
        )  # fmt: skip
        return out

    yield Operation(f"vllm-{kind}", cache.copies, run, lambda: cache.error(run(0)), TOLERANCE[inputs.q.dtype])
