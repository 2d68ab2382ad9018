"""SGLang's Triton decode kernel over 16-bit or fp8 rows, with its own choice of splits.

It casts queries and weights to the cache's dtype, so over fp8 it computes in fp8.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.kernels.inputs import Inputs
from benchmarks.kernels.operation import Operation
from benchmarks.kernels.peers.paged import FP8, TOLERANCE, paged_cache
from benchmarks.kernels.peers.registry import CannotRun

# The default of --triton-attention-num-kv-splits, and more, in case that is faster: long contexts want it.
_MAX_SPLITS = (8, 64)
_SCHEDULE_REQUESTS = 256
# Weights are rounded to 3 bits, and those below 2**-10 of the largest vanish.
_FP8_TOLERANCE = 0.15


def operations(inputs: Inputs, l2_bytes: int, kind: str, hollow: bool) -> Iterator[Operation]:
    """Yield SGLang's decode kernel for each limit of splits; see `registry.operations`."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

    case, device = inputs.case, inputs.device
    if case.q_len > 1:
        raise CannotRun("SGLang's decode kernel takes one query row a request")
    cache = paged_cache(inputs, l2_bytes, FP8 if kind == "fp8" else inputs.q.dtype, hollow)
    indptr, slots, seq_lens = cache.indptr(list(case.seq_lens)), cache.slots(), inputs.seq_lens()
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    for most in _MAX_SPLITS:
        shape = (case.batch, case.q_heads, most)
        partial = torch.empty(*shape, case.head_dim, dtype=torch.float32, device=device)
        lse = torch.empty(shape, dtype=torch.float32, device=device)
        splits = torch.empty(case.batch, dtype=torch.int32, device=device)
        get_num_kv_splits_triton[(1,)](
            splits, seq_lens, case.batch, 1, case.q_heads, case.kv_heads, most, cores, MAX_NUM_SEQ=_SCHEDULE_REQUESTS
        )
        out = torch.empty_like(inputs.q)

        def run(copy: int, out=out, partial=partial, lse=lse, splits=splits, most=most) -> torch.Tensor:
            decode_attention_fwd(
                inputs.q, cache.keys[copy].flatten(0, 1), cache.values[copy].flatten(0, 1), out, indptr, slots,
                partial, lse, splits, most, inputs.scale, 1.0, 1.0, logit_cap=case.logit_cap,
            )  # fmt: skip
            return out

        tolerance = _FP8_TOLERANCE if kind == "fp8" else TOLERANCE[inputs.q.dtype]
        name = f"sglang-{kind}-splits{most}"
        yield Operation(name, cache.copies, run, lambda run=run: cache.error(run(0)), tolerance)
