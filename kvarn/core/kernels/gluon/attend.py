"""Attention over records with layouts chosen by hand: what `kernels.attend` computes, in fewer instructions.

Triton picks layouts operation by operation. Here packed words go from shared memory to MMA operands and nothing else is
moved but the weights, once, between the two MMAs of a tile. A program's warps wait for records alone: while one tile is
worked on, the keys and the values of the next are copied to where this one's have been read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kvarn.core.kernels.address import find_record
from kvarn.core.kernels.chain import allow_next, wait_for_previous, wait_for_queries
from kvarn.core.kernels.gluon.layouts import (
    begin_copy,
    mma_layout,
    operand_width,
    query_load_layout,
    query_shared,
    raw_key_shared,
    raw_value_shared,
    repeat_layout,
    rows_copy_layout,
)
from kvarn.core.kernels.gluon.program import span_of, take_room
from kvarn.core.kernels.gluon.record import allocate_half, copy_next_half, key_logits, weigh_values
from kvarn.core.kernels.gluon.shared import attend_records_shared, serves_shared
from kvarn.core.kernels.gluon.wide import attend_records_wide, serves_wide
from kvarn.core.kernels.hadamard import rotated_in_fours
from kvarn.core.kernels.task import (
    LOG2E,
    NEVER,
    WEIGHT_SHIFT,
    cap,
    load_task,
    part_of_task,
    query_unit,
    wait_for_records,
)
from kvarn.core.kernels.unpack import one_below_other
from kvarn.core.kernels.work import reading_of_task


@gluon.jit
def _load_query(
    q_ptr, query_start, first_row, query_rows, token_stride, head_stride, head, D: gl.constexpr, COLUMNS: gl.constexpr,
    GROUP: gl.constexpr, ROWS: gl.constexpr, warps: gl.constexpr,
):  # fmt: skip
    """Load a task's queries, as four quarters of their channels, [D / 4, columns] each."""
    QUARTER: gl.constexpr = D // 4
    layout: gl.constexpr = query_load_layout(QUARTER, 4, warps)
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    channel = gl.arange(0, QUARTER, layout=gl.SliceLayout(1, layout))
    row = first_row + column // GROUP
    ok = ((column < ROWS * GROUP) & (row < query_rows))[None, :]
    at = (query_start + row).to(gl.int64) * token_stride + (head * GROUP + column % GROUP) * head_stride
    ptrs = q_ptr + (at[None, :] + channel[:, None])
    quarters = ()
    for i in gl.static_range(4):
        # from the second-level cache: see `kernels.chain`
        quarters = quarters + (gl.load(ptrs + i * QUARTER, mask=ok, other=0.0, cache_modifier=".cg"),)
    return quarters


@gluon.jit
def _rotate_query(quarters, q_parts):
    """Rotate queries into shared memory, [2, D, columns]: rounded to fp16, and what that leaves. Return their unit."""
    rotated = rotated_in_fours(
        quarters[0].to(gl.float32), quarters[1].to(gl.float32), quarters[2].to(gl.float32), quarters[3].to(gl.float32)
    )
    q = one_below_other(one_below_other(rotated[0], rotated[1]), one_below_other(rotated[2], rotated[3]))
    unit = query_unit(gl.max(gl.max(gl.abs(q), axis=0), axis=0))
    q = q / unit
    high = q.to(gl.float16)
    q_parts.index(0).store(high)
    q_parts.index(1).store((q - high.to(gl.float32)).to(gl.float16))
    return unit


@gluon.jit
def _begin_records(
    records_ptr, table, begin, stop, head, block_stride, tile_stride, head_stride, D: gl.constexpr, G: gl.constexpr,
    TILES: gl.constexpr, K_FIELDS: gl.constexpr, V_FIELDS: gl.constexpr, OFFSETS: gl.constexpr,
    GROUP_TOKENS: gl.constexpr, STAGES: gl.constexpr, warps: gl.constexpr,
):  # fmt: skip
    """Begin to copy the first STAGES tiles from begin to stop of a request, but for the values of the last of these.

    Return keys' and values' memory, and the record of which the values are left, as one more group.
    """
    K_OFFSETS: gl.constexpr = (OFFSETS[0], OFFSETS[1])
    V_OFFSETS: gl.constexpr = (OFFSETS[2], OFFSETS[3])
    k_words, k_vectors = allocate_half(K_FIELDS, G, G // GROUP_TOKENS * D, STAGES)
    v_words, v_vectors = allocate_half(V_FIELDS, D, G, STAGES)
    for i in gl.static_range(STAGES):
        page = gl.load(table + gl.maximum(gl.minimum(begin + i, stop - 1), 0))
        record = find_record(records_ptr, page, head, block_stride, tile_stride, head_stride, TILES)
        copy_next_half(k_words, k_vectors, record, i, begin + i < stop, K_FIELDS, K_OFFSETS, warps)
        if i < STAGES - 1:
            copy_next_half(v_words, v_vectors, record, i, begin + i < stop, V_FIELDS, V_OFFSETS, warps)
    return k_words, k_vectors, v_words, v_vectors, record


@gluon.jit
def _attend_records(
    k_words, k_vectors, v_words, v_vectors, records_ptr, table, begin, stop, sinks, record_stop, head, q_parts,
    q_scale, block_stride, tile_stride, head_stride,
    D: gl.constexpr, G: gl.constexpr, TILES: gl.constexpr, K_FIELDS: gl.constexpr, V_FIELDS: gl.constexpr,
    OFFSETS: gl.constexpr, GROUP_TOKENS: gl.constexpr, SOFTCAP: gl.constexpr, MASK_COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, warps: gl.constexpr,
):  # fmt: skip
    """Attend tiles begin to stop of a request from their records, of which the first were begun to be copied.

    Return running maximum, sum and output. sinks: tokens at the request's beginning that are read elsewhere;
    record_stop: [columns], where each column's reading of records ends, looked at with MASK_COLUMNS.
    """
    COLUMNS: gl.constexpr = q_parts.shape[2]
    mma: gl.constexpr = mma_layout(warps)
    v_right: gl.constexpr = gl.DotOperandLayout(1, mma, operand_width(V_FIELDS))
    K_OFFSETS: gl.constexpr = (OFFSETS[0], OFFSETS[1])
    V_OFFSETS: gl.constexpr = (OFFSETS[2], OFFSETS[3])
    tokens = gl.arange(0, G, layout=gl.SliceLayout(1, mma))
    m = gl.full((COLUMNS,), NEVER, gl.float32, gl.SliceLayout(0, mma))
    mass = gl.zeros((8, COLUMNS), gl.float32, gl.SliceLayout(0, repeat_layout(D, COLUMNS, warps)))
    acc = gl.zeros((D, COLUMNS), gl.float32, mma)
    slot = 0
    # a page is looked up one turn before its record is copied
    page = gl.load(table + gl.maximum(gl.minimum(begin + STAGES, stop - 1), 0))
    for tile in range(begin, stop):
        record = find_record(records_ptr, page, head, block_stride, tile_stride, head_stride, TILES)
        page = gl.load(table + gl.minimum(tile + STAGES + 1, stop - 1))
        async_copy.wait_group(2 * STAGES - 1)
        x = key_logits(k_words, k_vectors, slot, q_parts, K_FIELDS, G, GROUP_TOKENS, warps)
        copy_next_half(k_words, k_vectors, record, slot, tile + STAGES < stop, K_FIELDS, K_OFFSETS, warps)
        factor = q_scale
        if SOFTCAP > 0:
            x = cap(x * q_scale, SOFTCAP)
            factor = 1.0
        if tile * G < sinks:
            x = gl.where((tile * G + tokens >= sinks)[:, None], x, float("-inf"))
        if MASK_COLUMNS:
            x = gl.where(((tile + 1) * G <= record_stop)[None, :], x, float("-inf"))
        m_new = gl.maximum(m, gl.max(x, axis=0) * factor)
        decay = gl.exp2(m - m_new)
        p = gl.exp2(x * factor - (m_new - WEIGHT_SHIFT)[None, :]).to(gl.float16)
        p = gl.convert_layout(p, v_right)
        async_copy.wait_group(2 * STAGES - 1)
        o, added = weigh_values(p, v_words, v_vectors, slot, D, V_FIELDS, warps)
        copy_next_half(v_words, v_vectors, record, slot, tile + STAGES < stop, V_FIELDS, V_OFFSETS, warps)
        acc = acc * decay[None, :] + o
        mass = mass * gl.convert_layout(decay, gl.SliceLayout(0, mass.type.layout))[None, :] + added
        m = m_new
        slot = (slot + 1) % STAGES
    return m, gl.convert_layout(gl.max(mass, axis=0), gl.SliceLayout(0, mma)), acc


@gluon.jit
def _copy_raw(buffer, base, offsets, wanted, warps: gl.constexpr):
    """Begin to copy raw rows, which start at offsets after base, to shared memory, as one group; none if not wanted."""
    D: gl.constexpr = buffer.shape[1]
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, rows_copy_layout(2 * D, warps)))
    if wanted:
        begin_copy(buffer, base + (offsets[:, None] + channel[None, :]))
    async_copy.commit_group()


@gluon.jit
def _attend_raw(
    m, total, acc, q_parts, q_scale, k_buffer, v_buffer, k_base, v_base, next_offsets, has_next, ok,
    SOFTCAP: gl.constexpr, warps: gl.constexpr,
):  # fmt: skip
    """Fold a block of raw rows, copied to the buffers by two groups, into the running softmax, and copy the next.

    ok: [rows, columns]. Rows that no column sees repeat ones that are seen: no memory is read which nothing wrote.
    """
    ROWS: gl.constexpr = k_buffer.shape[0]
    mma: gl.constexpr = mma_layout(warps)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    async_copy.wait_group(1)
    k = k_buffer.load(gl.DotOperandLayout(0, mma, 8)).to(gl.float32).to(gl.float16)
    zeros = gl.zeros((ROWS, acc.shape[1]), gl.float32, mma)
    x = mma_v2(k, q_parts.index(0).load(right), zeros) + mma_v2(k, q_parts.index(1).load(right), zeros)
    _copy_raw(k_buffer, k_base, next_offsets, has_next, warps)
    x *= q_scale
    if SOFTCAP > 0:
        x = cap(x, SOFTCAP)
    x = gl.where(ok, x, float("-inf"))
    m_new = gl.maximum(m, gl.max(x, axis=0))
    decay = gl.exp2(m - m_new)
    p = gl.exp2(x - (m_new - WEIGHT_SHIFT)[None, :])
    p_half = gl.convert_layout(p.to(gl.float16), gl.DotOperandLayout(1, mma, 2))
    async_copy.wait_group(1)
    v = v_buffer.permute((1, 0)).load(gl.DotOperandLayout(0, mma, 2)).to(gl.float32).to(gl.float16)
    acc = mma_v2(v, p_half, acc * decay[None, :])
    _copy_raw(v_buffer, v_base, next_offsets, has_next, warps)
    return m_new, total * decay + gl.sum(p, axis=0), acc


@gluon.jit
def row_offsets(pos, origin, row_stride, RING: gl.constexpr):
    """Return where rows of some positions start, in elements after the row at origin, or after a ring of RING rows."""
    at = pos - origin
    if RING > 0:
        at = pos % RING
    return at * row_stride


@gluon.jit
def _attend_rows(
    m, total, acc, q_parts, q_scale, k_buffer, v_buffer, k_base, v_base, first, stop, start, end, origin, row_stride,
    record_stop, position, col_ok, RING: gl.constexpr, SOFTCAP: gl.constexpr, warps: gl.constexpr,
):  # fmt: skip
    """Attend blocks first to stop of the raw rows at positions start to end, each column those that it may see."""
    ROWS: gl.constexpr = k_buffer.shape[0]
    D: gl.constexpr = k_buffer.shape[1]
    block = gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma_layout(warps)))
    copied = gl.arange(0, ROWS, layout=gl.SliceLayout(1, rows_copy_layout(2 * D, warps)))
    offsets = row_offsets(gl.minimum(start + first * ROWS + copied, end - 1), origin, row_stride, RING)
    _copy_raw(k_buffer, k_base, offsets, first < stop, warps)
    _copy_raw(v_buffer, v_base, offsets, first < stop, warps)
    for unit in range(first, stop):
        pos = start + unit * ROWS + block
        visible = (pos[:, None] >= record_stop[None, :]) & (pos[:, None] <= position[None, :])
        visible = visible & (pos < end)[:, None] & col_ok[None, :]
        after = gl.minimum(start + (unit + 1) * ROWS + copied, end - 1)
        m, total, acc = _attend_raw(
            m, total, acc, q_parts, q_scale, k_buffer, v_buffer, k_base, v_base,
            row_offsets(after, origin, row_stride, RING), unit + 1 < stop, visible, SOFTCAP, warps,
        )  # fmt: skip
    return m, total, acc


@gluon.jit
def _attend_sinks(
    m, total, acc, q_parts, q_scale, k_buffer, v_buffer, k_base, v_base, record_stop, SINK: gl.constexpr,
    SOFTCAP: gl.constexpr, warps: gl.constexpr,
):  # fmt: skip
    """Attend a request's sinks, each column that reads records: it would find them there."""
    ROWS: gl.constexpr = k_buffer.shape[0]
    D: gl.constexpr = k_buffer.shape[1]
    block = gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma_layout(warps)))
    copied = gl.arange(0, ROWS, layout=gl.SliceLayout(1, rows_copy_layout(2 * D, warps)))
    offsets = gl.minimum(copied, SINK - 1) * D
    _copy_raw(k_buffer, k_base, offsets, True, warps)
    _copy_raw(v_buffer, v_base, offsets, True, warps)
    visible = (block < SINK)[:, None] & (record_stop > 0)[None, :]
    return _attend_raw(
        m, total, acc, q_parts, q_scale, k_buffer, v_buffer, k_base, v_base, offsets, False, visible, SOFTCAP, warps
    )  # fmt: skip


@gluon.jit(do_not_specialize=["tasks", "block_table_stride"])
def attend_kernel(
    q_ptr, records_ptr, tails_ptr, sinks_ptr, chunk_k_ptr, chunk_v_ptr,
    task_request_ptr, task_row_ptr, work_end_ptr, rows_ptr, prefix_ptr, length_ptr, own_start_ptr, sink_slot_ptr,
    query_start_ptr, block_table_ptr, partial_ptr, partial_lse_ptr, fills_ptr, scale, tasks,
    q_token_stride, q_head_stride, record_block_stride, record_tile_stride, record_head_stride, tail_row_stride,
    tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride, sink_head_stride, chunk_token_stride,
    chunk_head_stride, block_table_stride,
    GROUP: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    D: gl.constexpr, DP: gl.constexpr, G: gl.constexpr, RING: gl.constexpr, TILES: gl.constexpr, TAIL: gl.constexpr,
    SINK: gl.constexpr, K_FIELDS: gl.constexpr, V_FIELDS: gl.constexpr, OFFSETS: gl.constexpr,
    GROUP_TOKENS: gl.constexpr, SOFTCAP: gl.constexpr, ROWS_IN_RING: gl.constexpr, CANONICAL: gl.constexpr,
    RAW_BLOCK: gl.constexpr, TASK_BLOCK: gl.constexpr, SHARE: gl.constexpr, STAGES: gl.constexpr,
    ROOM: gl.constexpr, CHAINED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program attends an equal stretch of all tasks' shares, for one kv head: as `kernels.attend.attend_kernel`.

    ROOM: KiB of shared memory that it takes at least.
    """
    allow_next(CHAINED)
    take_room(tasks, ROOM, num_warps)
    program = gl.program_id(0)
    head = gl.program_id(1)
    mma: gl.constexpr = mma_layout(num_warps)
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, mma))
    channel = gl.arange(0, D, layout=gl.SliceLayout(1, mma))
    share_begin, share_end, first_task, last_task = span_of(
        program, gl.num_programs(0), work_end_ptr, tasks, TASK_BLOCK, SHARE, num_warps
    )
    if share_begin == share_end:
        last_task = first_task - 1
    for task in range(first_task, last_task + 1):
        begin, end = part_of_task(task, share_begin, share_end, work_end_ptr, SHARE)
        request, first_row, query_start, query_rows, prefix, length, own_start, sink_slot, ring_row = load_task(
            task, task_request_ptr, task_row_ptr, query_start_ptr, prefix_ptr, length_ptr, own_start_ptr, sink_slot_ptr,
            rows_ptr,
        )  # fmt: skip
        wait_for_records(own_start, prefix, ROWS_IN_RING, TAIL, CHAINED)
        row, col_ok, position, record_stop, tiles, ring_units, chunk_units, raw_start, ring_end, chunk_start = (
            reading_of_task(
                column, first_row, query_rows, prefix, length, own_start, GROUP, ROWS, G, TAIL, RAW_BLOCK, ROWS_IN_RING,
                CANONICAL,
            )
        )  # fmt: skip
        sinks = 0
        if sink_slot >= 0:
            sinks = SINK
        table = block_table_ptr + request.to(gl.int64) * block_table_stride
        # queries are loaded and rotated while these are on their way, and don't wait behind values
        stop = gl.minimum(end, tiles)
        k_words, k_vectors, v_words, v_vectors, record = _begin_records(
            records_ptr, table, begin, stop, head, record_block_stride, record_tile_stride, record_head_stride, D, G,
            TILES, K_FIELDS, V_FIELDS, OFFSETS, GROUP_TOKENS, STAGES, num_warps,
        )  # fmt: skip
        wait_for_queries(fills_ptr, CHAINED)
        quarters = _load_query(
            q_ptr, query_start, first_row, query_rows, q_token_stride, q_head_stride, head, D, COLUMNS, GROUP, ROWS,
            num_warps,
        )  # fmt: skip
        V_OFFSETS: gl.constexpr = (OFFSETS[2], OFFSETS[3])
        copy_next_half(
            v_words, v_vectors, record, STAGES - 1, begin + STAGES - 1 < stop, V_FIELDS, V_OFFSETS, num_warps
        )  # fmt: skip
        q_parts = gl.allocate_shared_memory(gl.float16, [2, D, COLUMNS], query_shared(K_FIELDS))
        q_scale = _rotate_query(quarters, q_parts) * (scale * LOG2E)
        WIDE: gl.constexpr = serves_wide(COLUMNS, ROWS, D, G, GROUP_TOKENS, V_FIELDS, num_warps)
        SHARED: gl.constexpr = serves_shared(COLUMNS, num_warps)
        if SHARED:
            m, total, acc = attend_records_shared(
                k_words, k_vectors, v_words, v_vectors, records_ptr, table, begin, stop, sinks,
                record_stop, head, q_parts, q_scale, record_block_stride, record_tile_stride, record_head_stride,
                D, G, TILES, K_FIELDS, V_FIELDS, OFFSETS, SOFTCAP, ROWS > 1, STAGES, num_warps,
            )  # fmt: skip
        elif WIDE:
            m, total, acc = attend_records_wide(
                k_words, k_vectors, v_words, v_vectors, records_ptr, table, begin, stop, sinks,
                head, q_parts, q_scale, record_block_stride, record_tile_stride, record_head_stride,
                D, G, TILES, K_FIELDS, V_FIELDS, OFFSETS, GROUP_TOKENS, SOFTCAP, STAGES, num_warps,
            )  # fmt: skip
        else:
            m, total, acc = _attend_records(
                k_words, k_vectors, v_words, v_vectors, records_ptr, table, begin, stop, sinks,
                record_stop, head, q_parts, q_scale, record_block_stride, record_tile_stride, record_head_stride,
                D, G, TILES, K_FIELDS, V_FIELDS, OFFSETS, GROUP_TOKENS, SOFTCAP, ROWS > 1, STAGES, num_warps,
            )  # fmt: skip

        m = gl.convert_layout(m, gl.SliceLayout(0, mma))
        total = gl.convert_layout(total, gl.SliceLayout(0, mma))
        acc = gl.convert_layout(acc, mma)

        wait_for_previous(CHAINED)
        k_buffer = gl.allocate_shared_memory(tails_ptr.dtype.element_ty, [RAW_BLOCK, D], raw_key_shared())
        v_buffer = gl.allocate_shared_memory(tails_ptr.dtype.element_ty, [RAW_BLOCK, D], raw_value_shared())
        if SINK > 0:  # noqa: SIM102 (joined, the body would be compiled for no sinks too)
            if (begin <= tiles) & (tiles < end) & (tiles > 0) & (sink_slot >= 0):
                base = sinks_ptr + sink_slot * sink_slot_stride + head * sink_head_stride
                m, total, acc = _attend_sinks(
                    m, total, acc, q_parts, q_scale, k_buffer, v_buffer, base, base + sink_kv_stride, record_stop,
                    SINK, SOFTCAP, num_warps,
                )  # fmt: skip
        base = tails_ptr + ring_row * tail_row_stride + head * tail_head_stride
        m, total, acc = _attend_rows(
            m, total, acc, q_parts, q_scale, k_buffer, v_buffer, base, base + tail_kv_stride,
            gl.maximum(begin - tiles, 0), gl.minimum(end - tiles, ring_units), raw_start, ring_end, 0, D, record_stop,
            position, col_ok, RING, SOFTCAP, num_warps,
        )  # fmt: skip
        if not ROWS_IN_RING:
            seen = tiles + ring_units
            base = query_start.to(gl.int64) * chunk_token_stride + head * chunk_head_stride
            m, total, acc = _attend_rows(
                m, total, acc, q_parts, q_scale, k_buffer, v_buffer, chunk_k_ptr + base, chunk_v_ptr + base,
                gl.maximum(begin - seen, 0), gl.minimum(end - seen, chunk_units), chunk_start, length,
                prefix, chunk_token_stride, record_stop, position, col_ok, 0, SOFTCAP, num_warps,
            )  # fmt: skip

        out_row = ((program + task).to(gl.int64) * gl.num_programs(1) + head) * COLUMNS + column
        lse = gl.where(total > 0, m + gl.log2(gl.maximum(total, 1e-37)) - WEIGHT_SHIFT, float("-inf"))
        gl.store(partial_lse_ptr + out_row, lse, mask=col_ok)
        out_ptrs = partial_ptr + out_row[None, :] * D + channel[:, None]
        gl.store(out_ptrs, acc / gl.maximum(total, 1e-37)[None, :], mask=(col_ok & (total > 0))[None, :])
    wait_for_previous(CHAINED)
