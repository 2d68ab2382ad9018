"""FlashInfer's paged decode on tensor cores, 16-bit or fp8 blocks. Over fp8 it computes in the model dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.kernels.inputs import Inputs
from benchmarks.kernels.operation import Operation
from benchmarks.kernels.peers.paged import BLOCK_TOKENS, FP8, TOLERANCE, paged_cache
from benchmarks.kernels.peers.registry import CannotRun

_WORKSPACE_BYTES = 256 << 20


def operations(inputs: Inputs, l2_bytes: int, kind: str, hollow: bool) -> Iterator[Operation]:
    """Yield FlashInfer's kernel; see `registry.operations`."""
    case = inputs.case
    if case.q_len > 1 or case.logit_cap or case.head_dim != 128 or inputs.q.dtype != torch.float16:
        raise CannotRun("left out: every further variant of FlashInfer takes a minute of nvcc")
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    dtype = FP8 if kind == "fp8" else inputs.q.dtype
    cache = paged_cache(inputs, l2_bytes, dtype, hollow)
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend="fa2")
    blocks = [row[:count] for row, count in zip(cache.table, cache.blocks_each, strict=True)]
    last = [(length - 1) % BLOCK_TOKENS + 1 for length in case.seq_lens]
    wrapper.plan(
        cache.indptr(cache.blocks_each), torch.cat(blocks),
        torch.tensor(last, dtype=torch.int32, device=inputs.device), case.q_heads, case.kv_heads, case.head_dim,
        BLOCK_TOKENS, q_data_type=inputs.q.dtype, kv_data_type=dtype, sm_scale=inputs.scale,
    )  # fmt: skip
    out = torch.empty_like(inputs.q)

    def run(copy: int) -> torch.Tensor:
        return wrapper.run(inputs.q, (cache.keys[copy], cache.values[copy]), out=out)

    yield Operation(f"flashinfer-{kind}", cache.copies, run, lambda: cache.error(run(0)), TOLERANCE[inputs.q.dtype])
