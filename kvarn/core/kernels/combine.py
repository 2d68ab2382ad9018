"""Merge the partial results of all splits, rotate back and cast."""

import triton
import triton.language as tl

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def combine_kernel(
    partial_ptr, partial_lse_ptr, signs_ptr, out_ptr, lse_ptr, num_rows, splits,
    SPLIT_BLOCK: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of ROWS rows). A row is one query head of one token; inputs and outputs are contiguous.

    partial: [rows, splits, D], float32; partial_lse: [rows, splits], float32, base 2; lse: natural logarithm.
    signs: [D, D], fp16, already transposed for the way back. ROWS is 16, rotated back by the tensor cores, or 1: then
    there are too few rows to fill the GPU, and a whole program hurries through the splits of one.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_ok = row < num_rows
    channels = tl.arange(0, DP)
    channel_ok = channels < D
    m = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DP), tl.float32)
    for start in range(0, splits, SPLIT_BLOCK):
        split = start + tl.arange(0, SPLIT_BLOCK)
        at = row[None, :] * splits + split[:, None]  # [SPLIT_BLOCK, ROWS]
        lse = tl.load(partial_lse_ptr + at, mask=row_ok[None, :] & (split < splits)[:, None], other=float("-inf"))
        m_new = tl.maximum(m, tl.max(lse, axis=0))
        weight = tl.exp2(lse - m_new[None, :])
        # what a split that saw nothing left in memory may be NaN
        mask = (weight > 0)[:, :, None] & channel_ok[None, None, :]
        part = tl.load(partial_ptr + at[:, :, None] * D + channels[None, None, :], mask=mask, other=0.0)
        decay = tl.exp2(m - m_new)
        acc = acc * decay[:, None] + tl.sum(part * weight[:, :, None], axis=0)
        total = total * decay + tl.sum(weight, axis=0)
        m = m_new
    acc = acc / tl.maximum(total, 1e-37)[:, None]
    signs = tl.load(
        signs_ptr + channels[:, None] * D + channels[None, :], mask=channel_ok[:, None] & channel_ok[None, :], other=0.0
    )
    if ROWS == 1:
        out = tl.sum(tl.reshape(acc, (DP, 1)) * signs.to(tl.float32), axis=0)[None, :]
    else:
        # two fp16 parts carry the float32 result through the tensor cores
        high = acc.to(tl.float16)
        low = (acc - high.to(tl.float32)).to(tl.float16)
        out = tl.dot(high, signs) + tl.dot(low, signs)
    out_mask = row_ok[:, None] & channel_ok[None, :]
    out_ptrs = out_ptr + row[:, None] * D + channels[None, :]
    tl.store(out_ptrs, (out * NORM).to(out_ptr.dtype.element_ty), mask=out_mask)
    lse = tl.where(total > 0, (m + tl.log2(tl.maximum(total, 1e-37))) * _LN2, float("-inf"))
    tl.store(lse_ptr + row, lse, mask=row_ok)
