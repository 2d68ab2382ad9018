"""What both attention kernels know of a task, and the constants of their softmax."""

import triton
import triton.language as tl

from kvarn.core.kernels.chain import wait_for_previous
from kvarn.core.kernels.work import crossing

NEVER = tl.constexpr(-1e30)  # a finite "minus infinity" for running maxima: no inf - inf, hence no NaN
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Weights are exp2(x - max + 7): where one token holds nearly all the mass, the others must not fall out of fp16.
WEIGHT_SHIFT = tl.constexpr(7.0)
# Queries are divided by a power of two that brings the largest to 2**6, so that q times a scale stays inside fp16.
QUERY_SHIFT = tl.constexpr(6.0)


@triton.jit
def cap(x, SOFTCAP: tl.constexpr):
    """Apply ``c * tanh(x / c)`` to base-2 logits."""
    y = x / (SOFTCAP * LOG2E)
    return (SOFTCAP * LOG2E) * (1.0 - 2.0 / (tl.exp2(2.0 * LOG2E * y) + 1.0))


@triton.jit
def query_unit(largest):
    """Return the power of two that queries are divided by, from the largest of them."""
    return tl.exp2(tl.ceil(tl.log2(tl.maximum(largest, 1e-30))) - QUERY_SHIFT)


@triton.jit
def part_of_task(task, share_begin, share_end, work_end_ptr, SHARE: tl.constexpr):
    """Return the units of a task, [begin, end), that fall to a program with these shares."""
    task_begin = tl.load(work_end_ptr + task - 1, mask=task > 0, other=0)
    task_end = tl.load(work_end_ptr + task) - crossing(SHARE)
    begin = tl.maximum(share_begin - task_begin, 0) * SHARE
    return begin, (tl.minimum(share_end, task_end) - task_begin) * SHARE


@triton.jit
def load_task(
    task,
    task_request_ptr,
    task_row_ptr,
    query_start_ptr,
    prefix_ptr,
    length_ptr,
    own_start_ptr,
    sink_slot_ptr,
    rows_ptr,
):
    """Return a task's request and first query row, and numbers of that request.

    These are where its query rows start, how many they are, prefix, length, own_start, sink slot and ring row.
    """
    # a task of no request has no units
    request = tl.maximum(tl.load(task_request_ptr + task), 0)
    query_start = tl.load(query_start_ptr + request)
    query_rows = tl.load(query_start_ptr + request + 1) - query_start
    prefix, length = tl.load(prefix_ptr + request), tl.load(length_ptr + request)
    own_start = tl.load(own_start_ptr + request)
    sink_slot = tl.load(sink_slot_ptr + request).to(tl.int64)
    ring_row = tl.load(rows_ptr + request).to(tl.int64)
    first_row = tl.load(task_row_ptr + task)
    return request, first_row, query_start, query_rows, prefix, length, own_start, sink_slot, ring_row


@triton.jit
def wait_for_records(
    own_start, prefix, ROWS_IN_RING: tl.constexpr, TAIL: tl.constexpr, CHAINED: tl.constexpr
):  # fmt: skip
    """Wait for the kernel before, if a task may read a record that the same step seals.

    In decode a request reads none that it seals itself, where newer tokens are read exact. In its first step it may
    read one that another request seals.
    """
    if ROWS_IN_RING and TAIL > 0:
        if own_start == prefix:
            wait_for_previous(CHAINED)
    else:
        wait_for_previous(CHAINED)
