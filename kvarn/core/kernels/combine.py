"""Merge the partial results of every task, rotate back and cast."""

import triton
import triton.language as tl

from kvarn.core.kernels.chain import allow_next, wait_for_previous
from kvarn.core.kernels.hadamard import hadamard
from kvarn.core.kernels.task import LN2, LOG2E
from kvarn.core.kernels.work import merging_of_task


@triton.jit(do_not_specialize=["tasks", "programs"])
def combine_kernel(
    partial_ptr, partial_lse_ptr, signs_ptr, out_ptr, lse_ptr, task_request_ptr, task_row_ptr, work_end_ptr,
    query_start_ptr, sink_logits_ptr, tasks, programs, q_heads,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    SHARE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, NORM: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program merges BLOCK columns of one task, PARTS parts at a time. Grid: (tasks, kv_heads, blocks of columns).

    partial, partial_lse: as `attend_kernel` leaves them, by that many programs; lse: natural logarithm. signs: [D, D],
    fp16, already transposed for the way back; looked at where D is no power of two, and BLOCK is 16 then. sink_logits:
    [q_heads], a part of every row with value zero; None for none.
    """
    allow_next(CHAINED)
    task = tl.program_id(0)
    head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    begin, end, first_program, last_program, row, row_ok = merging_of_task(
        task, head, column, task_request_ptr, task_row_ptr, work_end_ptr, query_start_ptr, tasks, programs, q_heads,
        GROUP, ROWS, SHARE,
    )  # fmt: skip
    channels = tl.arange(0, DP)
    channel_ok = channels < D
    wait_for_previous(CHAINED)
    if begin >= end:
        return
    m = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, DP), tl.float32)
    for start in range(first_program, last_program + 1, PARTS):
        program = start + tl.arange(0, PARTS)
        at = ((program + task).to(tl.int64) * kv_heads + head) * COLUMNS
        at = at[:, None] + column[None, :]  # [PARTS, BLOCK]
        # rows that no query has are loaded too: to know them takes as long as to load them
        ok = (column < COLUMNS)[None, :] & (program <= last_program)[:, None]
        lse = tl.load(partial_lse_ptr + at, mask=ok, other=float("-inf"))
        # asked for before warps meet over their maxima
        mask = ok[:, :, None] & channel_ok[None, None, :]
        part = tl.load(partial_ptr + at[:, :, None] * D + channels[None, None, :], mask=mask, other=0.0)
        m_new = tl.maximum(m, tl.max(lse, axis=0))
        weight = tl.exp2(lse - m_new[None, :])
        # what a part that saw nothing left in memory may be NaN
        part = tl.where((weight > 0)[:, :, None], part * weight[:, :, None], 0.0)
        decay = tl.exp2(m - m_new)
        acc = acc * decay[:, None] + tl.sum(part, axis=0)
        total = total * decay + tl.sum(weight, axis=0)
        m = m_new
    if sink_logits_ptr is not None:
        sink = tl.load(sink_logits_ptr + head * GROUP + column % GROUP).to(tl.float32) * LOG2E
        m_new = tl.maximum(m, sink)
        decay = tl.exp2(m - m_new)
        acc = acc * decay[:, None]
        total = total * decay + tl.exp2(sink - m_new)
        m = m_new
    acc = acc / tl.maximum(total, 1e-37)[:, None]
    if D == DP:
        out = hadamard(acc)
    else:
        mask = channel_ok[:, None] & channel_ok[None, :]
        signs = tl.load(signs_ptr + channels[:, None] * D + channels[None, :], mask=mask, other=0.0)
        # two fp16 parts carry the float32 result through the tensor cores
        high = acc.to(tl.float16)
        low = (acc - high.to(tl.float32)).to(tl.float16)
        out = tl.dot(high, signs) + tl.dot(low, signs)
    out_mask = row_ok[:, None] & channel_ok[None, :]
    out_ptrs = out_ptr + row[:, None] * D + channels[None, :]
    tl.store(out_ptrs, (out * NORM).to(out_ptr.dtype.element_ty), mask=out_mask)
    lse = tl.where(total > 0, (m + tl.log2(tl.maximum(total, 1e-37))) * LN2, float("-inf"))
    tl.store(lse_ptr + row, lse, mask=row_ok)
