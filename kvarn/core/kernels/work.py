"""Count what attention tasks have to read, so that programs can share it out evenly."""

import triton
import triton.language as tl

from kvarn.core.kernels.read_rule import record_end


@triton.constexpr_function
def crossing(share):
    """Return the shares that going from one task to the next counts as: see `core.work`."""
    return 1 if share == 1 else 0


@triton.jit
def units_of(
    first, last, prefix, length, own_start, G: tl.constexpr, TAIL: tl.constexpr, RAW_BLOCK: tl.constexpr,
    ROWS_IN_RING: tl.constexpr, CANONICAL: tl.constexpr,
):  # fmt: skip
    """Return what query rows at positions first to last of a request read, in the order in which they do.

    Returns:
        Tiles from records, blocks of ring rows, blocks of the step's own rows; where ring rows begin and end, and where
        the step's own begin.
    """
    committed = length if CANONICAL else prefix
    tiles = record_end(committed, last, own_start, TAIL, G) // G
    raw_start = record_end(committed, first, own_start, TAIL, G)
    ring_end = tl.minimum(length, last + 1) if ROWS_IN_RING else prefix
    chunk_start = tl.maximum(raw_start, ring_end)
    ring_units = tl.cdiv(tl.maximum(ring_end - raw_start, 0), RAW_BLOCK)
    chunk_units = tl.cdiv(tl.maximum(last + 1 - chunk_start, 0), RAW_BLOCK)
    return tiles, ring_units, chunk_units, raw_start, ring_end, chunk_start


@triton.jit
def reading_of_task(
    column, first_row, query_rows, prefix, length, own_start, GROUP: tl.constexpr, ROWS: tl.constexpr,
    G: tl.constexpr, TAIL: tl.constexpr, RAW_BLOCK: tl.constexpr, ROWS_IN_RING: tl.constexpr, CANONICAL: tl.constexpr,
):  # fmt: skip
    """Return what a task's query columns read: one after the other the rows of a request, each with GROUP heads.

    Returns:
        Each column's row, whether there is one, its position and where its reading of records ends; and `units_of` all.
    """
    row = first_row + column // GROUP
    ok = (column < ROWS * GROUP) & (row < query_rows)
    position = prefix + row
    last = prefix + tl.minimum(first_row + ROWS, query_rows) - 1
    tiles, ring_units, chunk_units, raw_start, ring_end, chunk_start = units_of(
        prefix + first_row, last, prefix, length, own_start, G, TAIL, RAW_BLOCK, ROWS_IN_RING, CANONICAL
    )
    committed = length if CANONICAL else prefix
    record_stop = tl.where(ok, record_end(committed, position, own_start, TAIL, G), 0)
    return row, ok, position, record_stop, tiles, ring_units, chunk_units, raw_start, ring_end, chunk_start


@triton.jit(do_not_specialize=["tasks"])
def count_work_kernel(
    task_request_ptr, task_row_ptr, query_start_ptr, prefix_ptr, length_ptr, own_start_ptr, work_end_ptr, tasks,
    ROWS: tl.constexpr, G: tl.constexpr, TAIL: tl.constexpr, RAW_BLOCK: tl.constexpr, ROWS_IN_RING: tl.constexpr,
    CANONICAL: tl.constexpr, SHARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the running sum of all tasks' shares of SHARE units."""
    done = 0
    for start in range(0, tasks, BLOCK):
        task = start + tl.arange(0, BLOCK)
        request = tl.load(task_request_ptr + task, mask=task < tasks, other=-1)
        real = request >= 0
        query_start = tl.load(query_start_ptr + request, mask=real, other=0)
        query_end = tl.load(query_start_ptr + request + 1, mask=real, other=0)
        prefix = tl.load(prefix_ptr + request, mask=real, other=0)
        length = tl.load(length_ptr + request, mask=real, other=0)
        own_start = tl.load(own_start_ptr + request, mask=real, other=0)
        first_row = tl.load(task_row_ptr + task, mask=real, other=0)
        first = prefix + first_row
        last = prefix + tl.minimum(first_row + ROWS, query_end - query_start) - 1
        tiles, ring_units, chunk_units, _, _, _ = units_of(
            first, last, prefix, length, own_start, G, TAIL, RAW_BLOCK, ROWS_IN_RING, CANONICAL
        )
        shares = tl.where(real, tl.cdiv(tiles + ring_units + chunk_units, SHARE) + crossing(SHARE), 0)
        tl.store(work_end_ptr + task, done + tl.cumsum(shares, axis=0), mask=task < tasks)
        done += tl.sum(shares, axis=0)


@triton.jit
def share_of(program, programs, total):
    """Return which of all tasks' shares are one program's, [begin, end). Programs differ by at most one share."""
    each, more = total // programs, total % programs
    begin = program * each + tl.minimum(program, more)
    return begin, tl.minimum(begin + each + 1, begin + each + tl.maximum(more - program, 0))


@triton.jit
def program_of(share, programs, total):
    """Return the program to which a share belongs."""
    each, more = total // programs, total % programs
    beyond = tl.maximum(share - more * (each + 1), 0)
    return tl.where(share < more * (each + 1), share // (each + 1), more + beyond // tl.maximum(each, 1))


@triton.jit
def merging_of_task(
    task, head, column, task_request_ptr, task_row_ptr, work_end_ptr, query_start_ptr, tasks, programs, q_heads,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Return a task's shares, [begin, end), the first and the last program that read some, and where columns go.

    These are the row of the output, of all query heads, of each column, and whether there is one.
    """
    begin = tl.load(work_end_ptr + task - 1, mask=task > 0, other=0)
    end = tl.load(work_end_ptr + task)
    total_shares = tl.load(work_end_ptr + tasks - 1)
    first_program = program_of(begin, programs, total_shares)
    last_program = program_of(end - 1 - crossing(SHARE), programs, total_shares)
    # a task of no request has no shares
    request = tl.maximum(tl.load(task_request_ptr + task), 0)
    query_start = tl.load(query_start_ptr + request)
    query_rows = tl.load(query_start_ptr + request + 1) - query_start
    query_row = tl.load(task_row_ptr + task) + column // GROUP
    ok = (column < ROWS * GROUP) & (query_row < query_rows)
    row = (query_start + query_row).to(tl.int64) * q_heads + head * GROUP + column % GROUP
    return begin, end, first_program, last_program, row, ok


@triton.jit
def task_at(share, work_end_ptr, tasks, BLOCK: tl.constexpr):
    """Return the task to which a share belongs."""
    before = 0
    for start in range(0, tasks, BLOCK):
        task = start + tl.arange(0, BLOCK)
        end = tl.load(work_end_ptr + task, mask=task < tasks, other=2147483647)
        before += tl.sum((end <= share).to(tl.int32), axis=0)
    return before
