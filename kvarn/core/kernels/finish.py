"""Merge the parts of a task in the launch that makes them: its programs meet when all have left theirs.

A task's programs count themselves in a word of memory, one for each task and kv head. Its low 16 bits say how many have
left their part, the next 8 how many gave up waiting, the highest 8 count launches: whoever arrives last sets the others
to zero and adds one there, so a word is ready for the next launch, however many parts that has. The last programs of a
task in the order of its work, one a query column as far as there are so many, wait for the rest and merge one column
after the other. Parts are summed in the order of programs: who arrives when changes no bit.

Nobody waits for ever: programs that can't run at once with the others give up, and leave their columns to the one that
arrives last. It merges them all, and where another does so too, that one writes the same bits.
"""

import triton
import triton.language as tl

from kvarn.core.kernels.hadamard import hadamard_of_row
from kvarn.core.kernels.task import LN2, LOG2E, NEVER
from kvarn.core.kernels.work import parts_of

# Numbers of parts that a program takes at a time.
MERGED_NUMBERS = tl.constexpr(4096)
_ARRIVED = tl.constexpr((1 << 16) - 1)
_ONE_GAVE_UP, _GAVE_UP = tl.constexpr(1 << 16), tl.constexpr(255 << 16)
_ONE_LAUNCH, _LAUNCH_BIT = tl.constexpr(1 << 24), tl.constexpr(24)


@triton.jit
def finish_tasks(
    first_task, last_task, lane, part, channel, partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, sink_logits_ptr,
    arrivals_ptr, task_request_ptr, task_row_ptr, work_end_ptr, query_start_ptr, tasks,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr, POLLS: tl.constexpr,
):  # fmt: skip
    """Tell that this program has left its parts of these tasks, and merge the columns that fall to it.

    lane: [parts taken at a time], from 0, as their log-sum-exps are loaded; part: the same, and channel: [D], slices of
    the layout in which parts are. partial, partial_lse: as `combine_kernel` has them, but what saw nothing is zero.
    arrivals: [tasks, kv_heads], zero but for what launches left; other pointers as of `combine_kernel`. POLLS: how
    often a program looks for the others before it gives up.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    words = arrivals_ptr + tl.program_id(1)
    kv_heads = tl.num_programs(1)
    USED: tl.constexpr = ROWS * GROUP
    first, parts = parts_of(last_task, work_end_ptr, tasks, programs)
    # what all threads of the program stored is released with the word, which one of them writes
    tl.debug_barrier()
    # Others take part in the first task and in the last, not in those between: a word of zeros does for these.
    found_first = 0
    if first_task < last_task:
        _, shared = parts_of(first_task, work_end_ptr, tasks, programs)
        found_first = _arrive(words + first_task * kv_heads, shared)
    found = _arrive(words + last_task * kv_heads, parts)
    for back in range(last_task - first_task + 1):
        task = last_task - back
        request = tl.maximum(tl.load(task_request_ptr + task), 0)
        query_start = tl.load(query_start_ptr + request)
        query_rows = tl.load(query_start_ptr + request + 1) - query_start
        first_row = tl.load(task_row_ptr + task)
        column, columns_apart = _columns_to_merge(words + task * kv_heads, found, program - first, parts, USED, POLLS)
        for one in range(column, USED, columns_apart):
            row = first_row + one // GROUP
            if row < query_rows:
                q_head = tl.program_id(1) * GROUP + one % GROUP
                at = ((first + task).to(tl.int64) * kv_heads + tl.program_id(1)) * COLUMNS + one
                _merge_column(
                    at, kv_heads * COLUMNS, parts, lane, part, channel, partial_ptr, partial_lse_ptr,
                    (query_start + row).to(tl.int64) * (kv_heads * GROUP) + q_head, q_head, out_ptr, lse_ptr,
                    sink_logits_ptr, NORM,
                )  # fmt: skip
        first, parts = parts_of(tl.maximum(task - 1, first_task), work_end_ptr, tasks, programs)
        found = tl.where(task - 1 == first_task, found_first, 0)


@triton.jit
def _arrive(word, parts):
    """Count this program's part of a task. Return the word that it found, which says whether it is the last."""
    found = tl.atomic_add(word, 1, sem="acq_rel", scope="gpu")
    if (found & _ARRIVED) == parts - 1:
        tl.atomic_add(word, _ONE_LAUNCH - parts - (found & _GAVE_UP), sem="relaxed", scope="gpu")
    return found


@triton.jit
def _complete(word, found, parts):
    """Tell by a task's word now, and as it was in this launch, whether all parts are there."""
    return ((word & _ARRIVED) == parts) | ((word >> _LAUNCH_BIT) != (found >> _LAUNCH_BIT))


@triton.jit
def _columns_to_merge(word, found, index, parts, USED: tl.constexpr, POLLS: tl.constexpr):
    """Wait until all parts of a task are there, if the program of this index has to merge some columns.

    Returns:
        Its first column, USED if it has none, and how far apart they are.
    """
    merging = tl.maximum(tl.minimum(parts, USED), 1)
    column = tl.where(parts > 0, parts - 1 - index, USED)
    if (found & _ARRIVED) == parts - 1:
        if (found & _GAVE_UP) != 0:
            column = 0
            merging = 1
    elif column < merging:
        polls = 0
        now = found
        while (polls < POLLS) & (_complete(now, found, parts) == 0):
            now = tl.atomic_add(word, 0, sem="acquire", scope="gpu")
            polls += 1
        if _complete(now, found, parts) == 0:
            now = tl.atomic_add(word, _ONE_GAVE_UP, sem="acq_rel", scope="gpu")
            if _complete(now, found, parts):
                tl.atomic_add(word, -_ONE_GAVE_UP, sem="relaxed", scope="gpu")
            else:
                column = USED
    else:
        column = USED
    return column, merging


@triton.jit
def _merge_column(
    at, part_stride, parts, lane, part, channel, partial_ptr, partial_lse_ptr, row, q_head, out_ptr, lse_ptr,
    sink_logits_ptr, NORM: tl.constexpr,
):  # fmt: skip
    """Merge one query column, as `combine_kernel` does. at: its row in the first part, part_stride: to the next part's.

    From the second-level cache: the first may hold what another launch left where parts are.
    """
    PARTS: tl.constexpr = part.shape[0]
    D: tl.constexpr = channel.shape[0]
    m = NEVER
    total = 0.0
    acc = channel.to(tl.float32) * 0.0
    for start in range(0, parts, PARTS):
        ok = start + lane < parts
        lse = tl.load(
            partial_lse_ptr + at + (start + lane) * part_stride, mask=ok, other=float("-inf"), cache_modifier=".cg"
        )
        rows = (at + (start + part) * part_stride)[:, None] * D + channel[None, :]
        x = tl.load(partial_ptr + rows, mask=(start + part < parts)[:, None], other=0.0, cache_modifier=".cg")
        m_new = tl.maximum(m, tl.max(lse, axis=0))
        weight = tl.exp2(lse - m_new)
        decay = tl.exp2(m - m_new)
        acc = acc * decay + tl.sum(x * tl.gather(weight, part, axis=0)[:, None], axis=0)
        total = total * decay + tl.sum(weight, axis=0)
        m = m_new
    if sink_logits_ptr is not None:
        sink = tl.load(sink_logits_ptr + q_head).to(tl.float32) * LOG2E
        m_new = tl.maximum(m, sink)
        decay = tl.exp2(m - m_new)
        acc = acc * decay
        total = total * decay + tl.exp2(sink - m_new)
        m = m_new
    out = hadamard_of_row(acc / tl.maximum(total, 1e-37), channel) * NORM
    tl.store(out_ptr + row * D + channel, out.to(out_ptr.dtype.element_ty))
    lse = tl.where(total > 0, (m + tl.log2(tl.maximum(total, 1e-37))) * LN2, float("-inf"))
    tl.store(lse_ptr + row, lse)
