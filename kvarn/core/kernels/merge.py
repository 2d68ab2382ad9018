"""Merge the attention of the same queries to two sets of keys."""

import triton
import triton.language as tl

from kvarn.core.kernels.task import LN2, LOG2E


# A step's lengths and where its requests begin mustn't make new variants.
@triton.jit(
    do_not_specialize=["rows", "lse_stride", "part_lse_stride"],
    do_not_specialize_on_alignment=["lse_ptr", "part_lse_ptr"],
)
def merge_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, rows, heads, lse_stride, part_lse_stride,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program merges BLOCK rows, each a head of a query. out, part: [queries, heads, D]; see `core.merge`."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = row < rows
    query, head = row // heads, (row % heads).to(tl.int64)
    lse = tl.load(lse_ptr + head * lse_stride + query, mask=ok, other=0.0) * LOG2E
    part_lse = tl.load(part_lse_ptr + head * part_lse_stride + query, mask=ok, other=0.0) * LOG2E
    m = tl.maximum(lse, part_lse)
    total = tl.exp2(lse - m) + tl.exp2(part_lse - m)
    weight = tl.exp2(part_lse - m) / total
    channels = tl.arange(0, DP)
    at = row.to(tl.int64)[:, None] * D + channels[None, :]
    mask = ok[:, None] & (channels < D)[None, :]
    out = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    part = tl.load(part_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (out + (part - out) * weight[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + head * lse_stride + query, (m + tl.log2(total)) * LN2, mask=ok)


@triton.jit(do_not_specialize=["rows", "lse_stride"], do_not_specialize_on_alignment=["lse_ptr"])
def merge_sinks_kernel(
    out_ptr, lse_ptr, sink_logits_ptr, rows, heads, lse_stride,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program merges sinks into BLOCK rows, each a head of a query. out: [queries, heads, D]; see `core.merge`."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = row < rows
    query, head = row // heads, (row % heads).to(tl.int64)
    lse = tl.load(lse_ptr + head * lse_stride + query, mask=ok, other=0.0)
    sink = tl.load(sink_logits_ptr + head, mask=ok, other=0.0).to(tl.float32)
    weight = 1.0 / (1.0 + tl.exp2((sink - lse) * LOG2E))
    channels = tl.arange(0, DP)
    at = row.to(tl.int64)[:, None] * D + channels[None, :]
    mask = ok[:, None] & (channels < D)[None, :]
    out = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    # what a query that saw nothing left in memory may be NaN
    out = tl.where(weight[:, None] > 0, out * weight[:, None], 0.0)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
