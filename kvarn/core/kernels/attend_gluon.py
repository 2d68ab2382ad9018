"""Attention over records with explicit layouts: what `kvarn.core.kernels.attend` computes, for GPUs, in fewer instructions.

Triton picks layouts tile by tile; here they are chosen so that packed words go from shared memory to MMA operands, and
weights from one MMA to the next, with no move that isn't needed. A program is one warp (two for wide heads): it walks its
tiles alone, keeps the next ones on their way to shared memory and waits for nobody.

What a tile owes to a query column whatever the token (offsets, and the 1024 that every unpacked element carries) comes
from MMAs whose left operand has equal rows, so that it arrives as the start value of the sums.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kvarn.core.kernels.address import find_record
from kvarn.core.kernels.chain import wait_for_previous
from kvarn.core.kernels.read_rule import record_end
from kvarn.core.kernels.unpack import BIAS, plane_asm, planes, side_by_side, weight_of
from kvarn.core.kernels.work import share_of, units_of

_NEVER = gl.constexpr(-1e30)
_LOG2E = gl.constexpr(1.4426950408889634)
_WEIGHT_SHIFT = gl.constexpr(10.0)
_QUERY_SHIFT = gl.constexpr(6.0)


@gluon.constexpr_function
def mma_layout(warps):
    """Return the layout of an MMA's result: warps side by side along its rows."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1], instr_shape=[16, 8])


@gluon.constexpr_function
def operand_width(fields):
    """Return how many neighbours along the inner dimension a thread holds: as many as each field's words allow."""
    return min(8, *(words // 4 for _, _, _, words in fields))


@gluon.constexpr_function
def words_layout(rows, words, width, warps):
    """Return the layout of packed words that turns into an MMA's left operand when planes are joined."""
    reg = [[0, 1 << i] for i in range(width.bit_length() - 1)] + [[8, 0]]
    reg += [[0, 1 << i] for i in range((4 * width).bit_length() - 1, words.bit_length() - 1)]
    reg += [[1 << i, 0] for i in range((16 * warps).bit_length() - 1, rows.bit_length() - 1)]
    lane = [[0, width], [0, 2 * width], [1, 0], [2, 0], [4, 0]]
    warp = [[1 << (4 + i), 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(reg, lane, warp, [], [rows, words])


@gluon.constexpr_function
def repeat_layout(rows, columns, warps):
    """Return the layout of an MMA's result [rows, columns] seen as [rows / 8, 8, columns]."""
    reg = [[0, 0, 1], [1, 0, 0]] + [[0, 0, 1 << i] for i in range(3, columns.bit_length() - 1)]
    reg += [[1 << i, 0, 0] for i in range((2 * warps).bit_length() - 1, (rows // 8).bit_length() - 1)]
    lane = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    warp = [[2 << i, 0, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(reg, lane, warp, [], [rows // 8, 8, columns])


@gluon.constexpr_function
def rows_copy_layout(row_bytes, warps):
    """Return the layout in which rows of some bytes are copied: 16 bytes a thread, neighbours along a row."""
    across = min(32, row_bytes // 16)
    return gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def vector_copy_layout(length, warps):
    """Return the layout in which a vector of halfs is copied: at least 4 bytes a thread."""
    return gl.BlockedLayout([max(2, min(8, length // (32 * warps)))], [32], [warps], [0])


@gluon.constexpr_function
def plain_shared(rank):
    """Return the layout of shared memory without swizzling: rows of words are read in whole lines of 128 bytes."""
    return gl.SwizzledSharedLayout(1, 1, 1, order=list(range(rank - 1, -1, -1)))


@gluon.constexpr_function
def query_shared(fields):
    """Return the layout of queries in shared memory, channels inside, as an MMA's right operand reads them."""
    return gl.SwizzledSharedLayout(4 * operand_width(fields), 1, max(1, 16 // (2 * operand_width(fields)) * 2), [0, 1])


@gluon.jit
def _unpack(words, BITS: gl.constexpr, layout: gl.constexpr):
    """Return ``1024 + code * 2**position`` of every lane, [rows, lanes], float16, as an MMA's left operand."""
    parts = ()
    for plane in gl.static_range(planes(BITS)):
        part = gl.inline_asm_elementwise(
            plane_asm(BITS, plane * BITS), "=r,r", [words], dtype=gl.float16, is_pure=True, pack=2
        )
        parts = parts + (part,)
    for _ in gl.static_range(planes(BITS).bit_length() - 1):
        pairs = ()
        for i in gl.static_range(0, len(parts), 2):
            pairs = pairs + (side_by_side(parts[i], parts[i + 1]),)
        parts = pairs
    return gl.convert_layout(parts[0], layout, assert_trivial=True)


@gluon.jit
def _lane_weights(LANES: gl.constexpr, BITS: gl.constexpr, LOW_BIT: gl.constexpr, layout: gl.constexpr):
    """Return the factor that makes ``code * 2**position`` count as a lane's part of the code, [lanes], float16."""
    low = gl.arange(0, LANES, layout=layout) // (LANES // planes(BITS)) * BITS
    return weight_of(low, BITS, LOW_BIT).to(gl.float16)


@gluon.jit
def _halves(x, layout: gl.constexpr):
    """Return two rows of x, [16, columns], whose rows 0-7 are alike and whose rows 8-15 are: [8, columns] each."""
    C: gl.constexpr = x.shape[1]
    first, second = gl.split(gl.permute(gl.reshape(x, (2, 8, C)), (1, 2, 0)))
    target: gl.constexpr = gl.SliceLayout(0, layout)
    return (
        gl.convert_layout(first, target, assert_trivial=True),
        gl.convert_layout(second, target, assert_trivial=True),
    )


@gluon.jit
def _repeat(x, ROWS: gl.constexpr, layout: gl.constexpr, mma: gl.constexpr):
    """Repeat x, [8, columns] with equal rows, down to [ROWS, columns], as an MMA's result."""
    C: gl.constexpr = x.shape[1]
    many, _ = gl.broadcast(gl.expand_dims(x, 0), gl.zeros((ROWS // 8, 8, C), gl.float32, layout))
    return gl.convert_layout(gl.reshape(many, (ROWS, C)), mma, assert_trivial=True)


@gluon.jit
def _copy_vector(buffer, ptr, warps: gl.constexpr):
    """Begin to copy a vector of halfs to shared memory."""
    at = gl.arange(0, buffer.shape[0], layout=vector_copy_layout(buffer.shape[0], warps))
    async_copy.async_copy_global_to_shared(buffer, ptr + at)


@gluon.jit
def _copy_rows(buffer, ptrs_of_rows, offsets, mask, layout: gl.constexpr):
    async_copy.async_copy_global_to_shared(buffer, ptrs_of_rows[:, None] + offsets[None, :], mask)


@gluon.jit
def _copy_words(buffer, record, OFFSET: gl.constexpr, warps: gl.constexpr):
    """Begin to copy a field's words to shared memory."""
    R: gl.constexpr = buffer.shape[0]
    W: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = rows_copy_layout(2 * W, warps)
    row = gl.arange(0, R, layout=gl.SliceLayout(1, layout))
    word = gl.arange(0, W, layout=gl.SliceLayout(0, layout))
    ptr = record.to(gl.pointer_type(gl.int16)) + OFFSET // 2
    async_copy.async_copy_global_to_shared(buffer, ptr + (row * W)[:, None] + word[None, :])


@gluon.jit
def _allocate_words(fields: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr):
    buffers = ()
    for f in gl.static_range(len(fields)):
        buffers = buffers + (gl.allocate_shared_memory(gl.int16, [STAGES, ROWS, fields[f][3]], plain_shared(2)),)
    return buffers


@gluon.jit
def _allocate_vectors(D: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr):
    buffers = ()
    for i in gl.static_range(6):
        buffers = buffers + (
            gl.allocate_shared_memory(gl.float16, [STAGES, G if 2 <= i and i <= 4 else D], plain_shared(1)),
        )
    return buffers


@gluon.jit
def _copy_half(
    words, vectors, record, slot, FIELDS: gl.constexpr, OFFSETS: gl.constexpr, FIRST: gl.constexpr, warps: gl.constexpr
):  # fmt: skip
    """Begin to copy the keys (FIRST = 0) or the values (FIRST = 3) of a record into a slot, as one group."""
    halfs = record.to(gl.pointer_type(gl.float16))
    for f in gl.static_range(len(FIELDS)):
        _copy_words(words[f].index(slot), record, FIELDS[f][2], warps)
    for i in gl.static_range(FIRST, FIRST + 3):
        _copy_vector(vectors[i].index(slot), halfs + OFFSETS[i] // 2, warps)


@gluon.jit
def _cap(x, SOFTCAP: gl.constexpr):
    """Apply ``c * tanh(x / c)`` to base-2 logits."""
    y = x / (SOFTCAP * _LOG2E)
    return (SOFTCAP * _LOG2E) * (1.0 - 2.0 / (gl.exp2(2.0 * _LOG2E * y) + 1.0))


@gluon.jit
def _logits(
    k_words, vectors, slot, q_parts, FIELDS: gl.constexpr, G: gl.constexpr, warps: gl.constexpr
):  # fmt: skip
    """Return q . k of one record's tokens, [G, columns], as an MMA's result."""
    D: gl.constexpr = q_parts.shape[1]
    C: gl.constexpr = q_parts.shape[2]
    mma: gl.constexpr = mma_layout(warps)
    width: gl.constexpr = operand_width(FIELDS)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, width)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, width)
    repeated: gl.constexpr = repeat_layout(G, C, warps)
    q_high = q_parts.index(0).load(right)
    scale = vectors[0].index(slot).load(gl.SliceLayout(1, right))
    offset = vectors[1].index(slot).load(gl.SliceLayout(0, left))
    offset, _ = gl.broadcast(offset[None, :], gl.zeros((16, D), gl.float16, left))
    zeros = gl.zeros((16, C), gl.float32, mma)
    bias = mma_v2(offset, q_high, zeros) + mma_v2(offset, q_parts.index(1).load(right), zeros)
    minus = gl.full((16, D), -BIAS, gl.float16, left)
    x = gl.zeros((G, C), gl.float32, mma)
    for f in gl.static_range(len(FIELDS)):
        weights = _lane_weights(D, FIELDS[f][0], FIELDS[f][1], gl.SliceLayout(1, right))
        scaled = q_high * weights[:, None] * scale[:, None]
        bias += mma_v2(minus, scaled, zeros)
        words = k_words[f].index(slot).load(words_layout(G, FIELDS[f][3], width, warps))
        x = mma_v2(_unpack(words, FIELDS[f][0], left), scaled, x)
    shift, _ = _halves(bias, repeated)
    x += _repeat(shift, G, repeated, mma)
    return x * vectors[2].index(slot).load(gl.SliceLayout(1, mma)).to(gl.float32)[:, None]


@gluon.jit
def _weigh_values(
    p, v_words, vectors, slot, D: gl.constexpr, FIELDS: gl.constexpr, warps: gl.constexpr
):  # fmt: skip
    """Return the sum of weight * v over one record's tokens, [D, columns], and that of the weights, in equal rows.

    p: [G, columns], fp16, as an MMA's right operand.
    """
    G: gl.constexpr = p.shape[0]
    C: gl.constexpr = p.shape[1]
    mma: gl.constexpr = mma_layout(warps)
    width: gl.constexpr = operand_width(FIELDS)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, width)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, width)
    repeated: gl.constexpr = repeat_layout(D, C, warps)
    scale = vectors[3].index(slot).load(gl.SliceLayout(1, right))
    offset = vectors[4].index(slot).load(gl.SliceLayout(0, left))
    upper = (gl.arange(0, 16, layout=gl.SliceLayout(1, left)) < 8)[:, None]
    ones = gl.full((16, G), 1.0, gl.float16, left)
    zeros = gl.zeros((16, C), gl.float32, mma)
    sums = mma_v2(gl.where(upper, offset[None, :], ones), p, zeros)
    minus = gl.where(upper, -BIAS * ones, 0.0 * ones)
    o = gl.zeros((D, C), gl.float32, mma)
    for f in gl.static_range(len(FIELDS)):
        weights = _lane_weights(G, FIELDS[f][0], FIELDS[f][1], gl.SliceLayout(1, right))
        scaled = p * weights[:, None] * scale[:, None]
        sums += mma_v2(minus, scaled, zeros)
        words = v_words[f].index(slot).load(words_layout(D, FIELDS[f][3], width, warps))
        o = mma_v2(_unpack(words, FIELDS[f][0], left), scaled, o)
    shift, mass = _halves(sums, repeated)
    o += _repeat(shift, D, repeated, mma)
    return o * vectors[5].index(slot).load(gl.SliceLayout(1, mma)).to(gl.float32)[:, None], mass


@gluon.jit
def _copy_raw(buffer, base, offsets, wanted, warps: gl.constexpr):
    """Begin to copy raw rows, which start at offsets after base, to shared memory, as one group; none if not wanted."""
    D: gl.constexpr = buffer.shape[1]
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, rows_copy_layout(2 * D, warps)))
    if wanted:
        async_copy.async_copy_global_to_shared(buffer, base + (offsets[:, None] + channel[None, :]))
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
        x = _cap(x, SOFTCAP)
    x = gl.where(ok, x, float("-inf"))
    m_new = gl.maximum(m, gl.max(x, axis=0))
    decay = gl.exp2(m - m_new)
    p = gl.exp2(x - (m_new - _WEIGHT_SHIFT)[None, :])
    p_half = gl.convert_layout(p.to(gl.float16), gl.DotOperandLayout(1, mma, 2))
    async_copy.wait_group(1)
    v = v_buffer.permute((1, 0)).load(gl.DotOperandLayout(0, mma, 2)).to(gl.float32).to(gl.float16)
    acc = mma_v2(v, p_half, acc * decay[None, :])
    _copy_raw(v_buffer, v_base, next_offsets, has_next, warps)
    return m_new, total * decay + gl.sum(p, axis=0), acc


@gluon.jit
def _span(program, programs, work_end_ptr, tasks, BLOCK: gl.constexpr, warps: gl.constexpr):
    """Return a program's shares, [begin, end), and the tasks to which its first and last belong.

    If BLOCK tasks are all there are, one load tells it all.
    """
    at = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [warps], [0]))
    ends = gl.load(work_end_ptr + at, mask=at < tasks, other=0)
    total = gl.max(ends, axis=0)
    if tasks > BLOCK:
        total = gl.load(work_end_ptr + tasks - 1)
    begin, end = share_of(program, programs, total)
    first = gl.sum(((ends <= begin) & (at < tasks)).to(gl.int32), axis=0)
    last = gl.sum(((ends <= end - 1) & (at < tasks)).to(gl.int32), axis=0)
    for start in range(BLOCK, tasks, BLOCK):
        ends = gl.load(work_end_ptr + start + at, mask=start + at < tasks, other=2147483647)
        first += gl.sum((ends <= begin).to(gl.int32), axis=0)
        last += gl.sum((ends <= end - 1).to(gl.int32), axis=0)
    return begin, end, first, last


@gluon.jit
def attend_kernel(
    q_ptr, records_ptr, tails_ptr, sinks_ptr, chunk_k_ptr, chunk_v_ptr,
    task_request_ptr, task_row_ptr, work_end_ptr, rows_ptr, prefix_ptr, length_ptr, own_start_ptr, sink_slot_ptr,
    query_start_ptr, block_table_ptr, partial_ptr, partial_lse_ptr, scale, tasks,
    q_heads, record_block_stride, record_tile_stride, record_head_stride, tail_row_stride, tail_kv_stride,
    tail_head_stride, sink_slot_stride, sink_kv_stride, sink_head_stride, chunk_token_stride, chunk_head_stride,
    block_table_stride,
    GROUP: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    D: gl.constexpr, DP: gl.constexpr, G: gl.constexpr, RING: gl.constexpr, TILES: gl.constexpr, TAIL: gl.constexpr,
    SINK: gl.constexpr, K_FIELDS: gl.constexpr, V_FIELDS: gl.constexpr, OFFSETS: gl.constexpr, SOFTCAP: gl.constexpr,
    ROWS_IN_RING: gl.constexpr, CANONICAL: gl.constexpr, RAW_BLOCK: gl.constexpr, TASK_BLOCK: gl.constexpr,
    SHARE: gl.constexpr, STAGES: gl.constexpr, CHAINED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program attends an equal stretch of all tasks' shares, for one kv head. As `attend.attend_kernel`."""
    wait_for_previous(CHAINED)
    warps: gl.constexpr = num_warps
    program = gl.program_id(0)
    head = gl.program_id(1)
    share_begin, share_end, first_task, last_task = _span(
        program, gl.num_programs(0), work_end_ptr, tasks, TASK_BLOCK, warps
    )
    if share_begin < share_end:
        mma: gl.constexpr = mma_layout(warps)
        by_column: gl.constexpr = gl.SliceLayout(0, mma)
        by_row: gl.constexpr = gl.SliceLayout(1, mma)
        k_right: gl.constexpr = gl.DotOperandLayout(1, mma, operand_width(K_FIELDS))
        raw_layout: gl.constexpr = gl.SliceLayout(1, rows_copy_layout(2 * D, warps))
        v_right: gl.constexpr = gl.DotOperandLayout(1, mma, operand_width(V_FIELDS))
        tokens = gl.arange(0, G, layout=by_row)
        column = gl.arange(0, COLUMNS, layout=by_column)
        block = gl.arange(0, RAW_BLOCK, layout=by_row)
        copy_block = gl.arange(0, RAW_BLOCK, layout=raw_layout)
        raw_dtype: gl.constexpr = tails_ptr.dtype.element_ty
        for task in range(first_task, last_task + 1):
            task_begin = gl.load(work_end_ptr + task - 1, mask=task > 0, other=0)
            begin = gl.maximum(share_begin - task_begin, 0) * SHARE
            end = (gl.minimum(share_end, gl.load(work_end_ptr + task)) - task_begin) * SHARE
            request = gl.maximum(gl.load(task_request_ptr + task), 0)
            first_row = gl.load(task_row_ptr + task)
            query_start = gl.load(query_start_ptr + request)
            query_rows = gl.load(query_start_ptr + request + 1) - query_start
            prefix = gl.load(prefix_ptr + request)
            length = gl.load(length_ptr + request)
            own_start = gl.load(own_start_ptr + request)
            sink_slot = gl.load(sink_slot_ptr + request).to(gl.int64)
            ring_row = gl.load(rows_ptr + request).to(gl.int64)
            table = block_table_ptr + request.to(gl.int64) * block_table_stride

            row = first_row + column // GROUP
            col_ok = (column < ROWS * GROUP) & (row < query_rows)
            position = prefix + row
            last = prefix + gl.minimum(first_row + ROWS, query_rows) - 1
            tiles, ring_units, chunk_units, raw_start, ring_end, chunk_start = units_of(
                prefix + first_row, last, prefix, length, own_start, G, TAIL, RAW_BLOCK, ROWS_IN_RING, CANONICAL
            )
            committed = prefix
            if CANONICAL:
                committed = length
            record_stop = gl.where(col_ok, record_end(committed, position, own_start, TAIL, G), 0)
            sinks = 0
            if sink_slot >= 0:
                sinks = SINK

            k_words = _allocate_words(K_FIELDS, G, STAGES)
            v_words = _allocate_words(V_FIELDS, D, STAGES)
            vectors = _allocate_vectors(D, G, STAGES)
            stop = gl.minimum(end, tiles)
            for i in gl.static_range(STAGES):
                if begin + i < stop:
                    record = find_record(
                        records_ptr, gl.load(table + begin + i), head, record_block_stride, record_tile_stride,
                        record_head_stride, TILES,
                    )  # fmt: skip
                    _copy_half(k_words, vectors, record, i, K_FIELDS, OFFSETS, 0, warps)
                    async_copy.commit_group()
                    _copy_half(v_words, vectors, record, i, V_FIELDS, OFFSETS, 3, warps)
                    async_copy.commit_group()
                else:
                    async_copy.commit_group()
                    async_copy.commit_group()

            q_column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, k_right))
            q_row = first_row + q_column // GROUP
            q_ok = (q_column < ROWS * GROUP) & (q_row < query_rows)
            q_at = ((query_start + q_row) * q_heads + head * GROUP + q_column % GROUP) * D
            q_channel = gl.arange(0, D, layout=gl.SliceLayout(1, k_right))
            q = gl.load(q_ptr + (q_at[None, :] + q_channel[:, None]), mask=q_ok[None, :], other=0.0)
            largest = gl.max(gl.max(gl.abs(q), axis=0), axis=0)
            q_unit = gl.exp2(gl.ceil(gl.log2(gl.maximum(largest, 1e-30))) - _QUERY_SHIFT)
            q_scale = q_unit * (scale * _LOG2E)
            q = q / q_unit
            q_high = q.to(gl.float16)
            q_parts = gl.allocate_shared_memory(gl.float16, [2, D, COLUMNS], query_shared(K_FIELDS))
            q_parts.index(0).store(q_high)
            q_parts.index(1).store((q - q_high.to(gl.float32)).to(gl.float16))

            m = gl.full((COLUMNS,), _NEVER, gl.float32, by_column)
            acc = gl.zeros((D, COLUMNS), gl.float32, mma)
            mass = gl.zeros((8, COLUMNS), gl.float32, gl.SliceLayout(0, repeat_layout(D, COLUMNS, warps)))
            slot = 0
            page = gl.load(table + gl.maximum(gl.minimum(begin + STAGES, stop - 1), 0))
            for tile in range(begin, stop):
                record = find_record(
                    records_ptr, page, head, record_block_stride, record_tile_stride, record_head_stride, TILES
                )
                page = gl.load(table + gl.minimum(tile + STAGES + 1, stop - 1))
                async_copy.wait_group(2 * STAGES - 1)
                x = _logits(k_words, vectors, slot, q_parts, K_FIELDS, G, warps)
                if tile + STAGES < stop:
                    _copy_half(k_words, vectors, record, slot, K_FIELDS, OFFSETS, 0, warps)
                async_copy.commit_group()
                factor = q_scale
                if SOFTCAP > 0:
                    x = _cap(x * q_scale, SOFTCAP)
                    factor = 1.0
                if tile * G < sinks:
                    x = gl.where((tile * G + tokens >= sinks)[:, None], x, float("-inf"))
                if ROWS > 1:
                    x = gl.where(((tile + 1) * G <= record_stop)[None, :], x, float("-inf"))
                m_new = gl.maximum(m, gl.max(x, axis=0) * factor)
                decay = gl.exp2(m - m_new)
                p = gl.exp2(x * factor - (m_new - _WEIGHT_SHIFT)[None, :]).to(gl.float16)
                p = gl.convert_layout(p, v_right)
                async_copy.wait_group(2 * STAGES - 1)
                o, added = _weigh_values(p, v_words, vectors, slot, D, V_FIELDS, warps)
                if tile + STAGES < stop:
                    _copy_half(v_words, vectors, record, slot, V_FIELDS, OFFSETS, 3, warps)
                async_copy.commit_group()
                acc = acc * decay[None, :] + o
                mass = mass * gl.convert_layout(decay, gl.SliceLayout(0, mass.type.layout))[None, :] + added
                m = m_new
                slot = (slot + 1) % STAGES
            total = gl.convert_layout(gl.max(mass, axis=0), by_column)

            k_swizzle: gl.constexpr = gl.SwizzledSharedLayout(32, 1, 2, [1, 0])
            v_swizzle: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
            k_buffer = gl.allocate_shared_memory(raw_dtype, [RAW_BLOCK, D], k_swizzle)
            v_buffer = gl.allocate_shared_memory(raw_dtype, [RAW_BLOCK, D], v_swizzle)
            if (SINK > 0) & (begin <= tiles) & (tiles < end) & (tiles > 0) & (sink_slot >= 0):
                base = sinks_ptr + sink_slot * sink_slot_stride + head * sink_head_stride
                offsets = gl.minimum(copy_block, SINK - 1) * D
                visible = (block < SINK)[:, None] & (record_stop > 0)[None, :]
                _copy_raw(k_buffer, base, offsets, True, warps)
                _copy_raw(v_buffer, base + sink_kv_stride, offsets, True, warps)
                m, total, acc = _attend_raw(
                    m, total, acc, q_parts, q_scale, k_buffer, v_buffer, base, base, offsets, False, visible, SOFTCAP,
                    warps,
                )  # fmt: skip
            first = gl.maximum(begin - tiles, 0)
            stop = gl.minimum(end - tiles, ring_units)
            base = tails_ptr + ring_row * tail_row_stride + head * tail_head_stride
            newest = ring_end - 1
            offsets = gl.minimum(raw_start + first * RAW_BLOCK + copy_block, newest) % RING * D
            _copy_raw(k_buffer, base, offsets, first < stop, warps)
            _copy_raw(v_buffer, base + tail_kv_stride, offsets, first < stop, warps)
            for unit in range(first, stop):
                pos = raw_start + unit * RAW_BLOCK + block
                visible = (pos[:, None] >= record_stop[None, :]) & (pos[:, None] <= position[None, :])
                visible = visible & (pos < ring_end)[:, None] & col_ok[None, :]
                offsets = gl.minimum(raw_start + (unit + 1) * RAW_BLOCK + copy_block, newest) % RING * D
                m, total, acc = _attend_raw(
                    m, total, acc, q_parts, q_scale, k_buffer, v_buffer, base, base + tail_kv_stride, offsets,
                    unit + 1 < stop, visible, SOFTCAP, warps,
                )  # fmt: skip
            if not ROWS_IN_RING:
                seen = tiles + ring_units
                first = gl.maximum(begin - seen, 0)
                stop = gl.minimum(end - seen, chunk_units)
                to_head = (query_start - prefix).to(gl.int64) * chunk_token_stride + head * chunk_head_stride
                k_base = chunk_k_ptr + to_head
                v_base = chunk_v_ptr + to_head
                at = chunk_start + first * RAW_BLOCK + copy_block
                offsets = gl.minimum(at, length - 1).to(gl.int64) * chunk_token_stride
                _copy_raw(k_buffer, k_base, offsets, first < stop, warps)
                _copy_raw(v_buffer, v_base, offsets, first < stop, warps)
                for unit in range(first, stop):
                    pos = chunk_start + unit * RAW_BLOCK + block
                    visible = (pos[:, None] >= record_stop[None, :]) & (pos[:, None] <= position[None, :])
                    at = chunk_start + (unit + 1) * RAW_BLOCK + copy_block
                    offsets = gl.minimum(at, length - 1).to(gl.int64) * chunk_token_stride
                    m, total, acc = _attend_raw(
                        m, total, acc, q_parts, q_scale, k_buffer, v_buffer, k_base, v_base, offsets, unit + 1 < stop,
                        visible & col_ok[None, :], SOFTCAP, warps,
                    )  # fmt: skip

            out_ok = col_ok & (begin < end)
            out_row = ((program + task).to(gl.int64) * gl.num_programs(1) + head) * COLUMNS + column
            lse = gl.where(total > 0, m + gl.log2(gl.maximum(total, 1e-37)) - _WEIGHT_SHIFT, float("-inf"))
            gl.store(partial_lse_ptr + out_row, lse, mask=out_ok)
            channels = gl.arange(0, D, layout=by_row)
            out_ptrs = partial_ptr + out_row[None, :] * D + channels[:, None]
            gl.store(out_ptrs, acc / gl.maximum(total, 1e-37)[None, :], mask=(out_ok & (total > 0))[None, :])
