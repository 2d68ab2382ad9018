"""Attention over latents by Hopper's warp groups, 64 query columns a program: what `kernels.latent.attend` computes.

Columns are rows of the MMAs of two groups: 64 columns by 128 tokens, then 64 columns by 256 channels, twice. MMAs run
beside the restoring of records: while the output takes up the second half of a tile, the next tile's first half
replaces what it has taken, and while logits take up that, the second half is restored. Raw rows have no next.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from kvarn.core.kernels.address import find_record
from kvarn.core.kernels.chain import allow_next, wait_for_previous
from kvarn.core.kernels.gluon.attend import row_offsets
from kvarn.core.kernels.gluon.group_tiles import (
    BLOCK,
    BLOCKS,
    COLUMNS,
    HALF,
    PLANE,
    TOKENS,
    WARPS,
    begin_records,
    blocks_together,
    copy_rope,
    copy_scales,
    groups_mma,
    load_queries,
    load_rope_words,
    load_words,
    operand_shared,
    prefetch_record,
    restore_rope,
    restored_plane,
    rows_layout,
    store_rows,
)
from kvarn.core.kernels.gluon.program import span_of
from kvarn.core.kernels.task import LOG2E, NEVER, WEIGHT_SHIFT, load_task, part_of_task, wait_for_records
from kvarn.core.kernels.work import reading_of_task

# A running maximum grows once logits are so much larger, in powers of two: weights stay inside fp16, and few tiles have
# the output decay.
_SLACK = gl.constexpr(8.0)


@gluon.jit
def _make_visible():
    """Let MMAs see what any thread wrote to shared memory. Without this barrier each in a loop would have its own."""
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _add_logits(x, q, k, begin, end):
    """Begin to add the products of blocks begin to end of queries and of a tile to logits, [columns, tokens]."""
    for b in range(begin, end):
        x = warpgroup_mma(q.index(b), k.index(b).permute((1, 0)), x, is_async=True)
    return x


@gluon.jit
def _logits(q, k):
    """Return q . k of a tile that was just brought to shared memory, [columns, tokens]."""
    _make_visible()
    x = warpgroup_mma_init(gl.zeros((COLUMNS, TOKENS), gl.float32, groups_mma(TOKENS)))
    return warpgroup_mma_wait(0, deps=[_add_logits(x, q, k, 0, BLOCKS)])


@gluon.jit
def _by_thread(x):
    """Sum x, [columns, tokens], over the tokens that a thread holds, [columns, groups, threads of a row]."""
    return gl.sum(gl.sum(gl.reshape(x, (COLUMNS, 2, 8, 4, 2)), axis=4), axis=2)


@gluon.jit
def _weights(m, mass, acc, x, q_scale, k):
    """Fold logits into the running maximum and sums, and let the output decay. Return them, and weights as an operand.

    Weights, [columns, tokens], replace the rope part, which nothing needs once both groups have their logits: to find
    a row's maximum they wait for one another.
    """
    largest = gl.max(x, axis=1) * q_scale
    m_new = gl.where(largest > m + _SLACK, largest, m)
    decay = gl.exp2(m - m_new)
    p = gl.exp2(x * q_scale[:, None] - (m_new - WEIGHT_SHIFT)[:, None])
    of_threads = gl.convert_layout(decay, gl.SliceLayout(1, gl.SliceLayout(2, mass.type.layout)))
    mass = mass * of_threads[:, None, None] + _by_thread(p)
    shared = k.index(8)._reinterpret(gl.float16, (COLUMNS, TOKENS), operand_shared())
    shared.store(p.to(gl.float16))
    if gl.max((m_new > m).to(gl.int32), axis=0) > 0:
        of_output = gl.convert_layout(decay, gl.SliceLayout(1, groups_mma(HALF)), assert_trivial=True)[:, None]
        acc = (acc[0] * of_output, acc[1] * of_output)
    _make_visible()
    return m_new, mass, acc, shared


@gluon.jit
def _masked(x, tile, sinks, record_stop, MASK_COLUMNS: gl.constexpr):
    """Mask the logits of a tile: tokens that are sinks, and columns that don't read the record."""
    if MASK_COLUMNS:
        x = gl.where(((tile + 1) * TOKENS <= record_stop)[:, None], x, float("-inf"))
    if tile * TOKENS < sinks:
        token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, x.type.layout))
        x = gl.where((tile * TOKENS + token >= sinks)[None, :], x, float("-inf"))
    return x


@gluon.jit
def _attend_records(
    k, vectors, rope_vectors, words, records_ptr, table, begin, stop, sinks, record_stop, q, q_scale, block_stride,
    tile_stride,
    TILES: gl.constexpr, FIELDS: gl.constexpr, SCALES: gl.constexpr, ROPE_START: gl.constexpr,
    ROPE_FIELDS: gl.constexpr, ROPE_SCALES: gl.constexpr, MASK_COLUMNS: gl.constexpr,
):  # fmt: skip
    """Attend tiles begin to stop of a request from their records, as `latent._attend_records` does.

    record_stop, q_scale: [columns]. Return the running maximum, what each thread sums, and the output's halves.
    """
    BITS: gl.constexpr = FIELDS[0][0]
    mma: gl.constexpr = groups_mma(TOKENS)
    nothing = gl.zeros((COLUMNS, TOKENS), gl.float32, mma)
    m = gl.full((COLUMNS,), NEVER, gl.float32, gl.SliceLayout(1, mma))
    mass = _by_thread(nothing)
    zeros = gl.zeros((COLUMNS, HALF), gl.float32, groups_mma(HALF))
    acc = (zeros, zeros)
    planes = blocks_together(k, PLANE)
    if begin < stop:
        page = gl.load(table + gl.minimum(begin + 1, stop - 1))
        async_copy.wait_group(0)
        scales = (vectors[0].index(0), vectors[1].index(0))
        for plane in gl.static_range(4):
            planes.index(plane).store(restored_plane(words[0], scales, BITS, plane))
        restore_rope(k, words[1], (rope_vectors[0].index(0), rope_vectors[1].index(0)), ROPE_FIELDS)
        x = _logits(q, k)
        slot = 0
        # x is of the tile before, whose latents stand in k
        for tile in range(begin + 1, stop):
            slot = 1 - slot
            record = find_record(records_ptr, page, 0, block_stride, tile_stride, 0, TILES)
            page = gl.load(table + gl.minimum(tile + 1, stop - 1))
            copy_scales(vectors, rope_vectors, slot, record, True, SCALES, ROPE_FIELDS, ROPE_SCALES)
            prefetch_record(record, FIELDS, ROPE_START, ROPE_FIELDS)
            x = _masked(x, tile - 1, sinks, record_stop, MASK_COLUMNS)
            m, mass, acc, p = _weights(m, mass, acc, x, q_scale, k)
            first, second = _weigh(acc, p, k)
            packed = load_words(record, True, FIELDS)
            rope_packed = load_rope_words(record, True, ROPE_START, ROPE_FIELDS)
            async_copy.wait_group(0)
            scales = (vectors[0].index(slot), vectors[1].index(slot))
            ahead = restored_plane(packed, scales, BITS, 0)
            first, second, ahead = warpgroup_mma_wait(1, deps=[first, second, ahead])
            gl.thread_barrier()  # the other group's MMAs read there too
            planes.index(0).store(ahead)
            planes.index(1).store(restored_plane(packed, scales, BITS, 1))
            _make_visible()
            x = _add_logits(warpgroup_mma_init(nothing), q, k, 0, 4)
            ahead = restored_plane(packed, scales, BITS, 2)
            # all but the logits' four
            first, second, x, ahead = warpgroup_mma_wait(4, deps=[first, second, x, ahead])
            acc = (first, second)
            gl.thread_barrier()
            copy_rope(k, record, True, ROPE_START, ROPE_FIELDS)
            planes.index(2).store(ahead)
            planes.index(3).store(restored_plane(packed, scales, BITS, 3))
            restore_rope(k, rope_packed, (rope_vectors[0].index(slot), rope_vectors[1].index(slot)), ROPE_FIELDS)
            async_copy.wait_group(0)
            _make_visible()
            x = warpgroup_mma_wait(0, deps=[_add_logits(warpgroup_mma_init(x), q, k, 4, BLOCKS)])
        x = _masked(x, stop - 1, sinks, record_stop, MASK_COLUMNS)
        m, mass, acc = _fold(m, mass, acc, x, q_scale, k)
    return m, mass, acc


@gluon.jit
def _weigh(acc, p, k):
    """Begin to add weight * latent of a tile to the output, a half of its channels after the other."""
    halves = blocks_together(k, HALF)
    first = warpgroup_mma(p, halves.index(0), acc[0], is_async=True)
    return first, warpgroup_mma(p, halves.index(1), acc[1], is_async=True)


@gluon.jit
def _fold(m, mass, acc, x, q_scale, k):
    """Fold the logits of a tile in shared memory into the running softmax, and nothing beside it."""
    m, mass, acc, p = _weights(m, mass, acc, x, q_scale, k)
    first, second = _weigh(acc, p, k)
    acc = warpgroup_mma_wait(0, deps=[first, second])
    gl.thread_barrier()  # the other group's MMAs read the tile too
    return m, mass, acc


@gluon.jit
def _attend_raw(m, mass, acc, q, q_scale, k, base, offsets, visible):
    """Fold raw rows, 128 that start at offsets after base, into the running softmax. visible: [columns, rows].

    Rows that no column sees repeat ones that are seen: no memory is read which nothing wrote.
    """
    store_rows(k, base, offsets, offsets >= 0)
    return _fold(m, mass, acc, gl.where(visible, _logits(q, k), float("-inf")), q_scale, k)


@gluon.jit
def _attend_rows(
    m, mass, acc, q, q_scale, k, base, first, stop, start, end, origin, row_stride, record_stop,
    position, col_ok, RING: gl.constexpr, RAW_BLOCK: gl.constexpr,
):  # fmt: skip
    """Attend blocks first to stop of RAW_BLOCK rows at positions start to end, each column those that it may see."""
    row = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, groups_mma(TOKENS)))
    stored = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, rows_layout(PLANE, WARPS)))
    stop_row = gl.minimum(start + stop * RAW_BLOCK, end)
    for at in range(start + first * RAW_BLOCK, stop_row, TOKENS):
        pos = at + row
        visible = (pos[None, :] >= record_stop[:, None]) & (pos[None, :] <= position[:, None])
        visible = visible & (pos < stop_row)[None, :] & col_ok[:, None]
        offsets = row_offsets(gl.minimum(at + stored, stop_row - 1), origin, row_stride, RING)
        m, mass, acc = _attend_raw(m, mass, acc, q, q_scale, k, base, offsets, visible)
    return m, mass, acc


@gluon.jit
def _attend_sinks(m, mass, acc, q, q_scale, k, base, record_stop, SINK: gl.constexpr):
    """Attend a request's sinks, each column that reads records: it would find them there."""
    row = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, groups_mma(TOKENS)))
    stored = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, rows_layout(PLANE, WARPS)))
    visible = (row < SINK)[None, :] & (record_stop > 0)[:, None]
    offsets = gl.minimum(stored, SINK - 1) * (BLOCKS * BLOCK)
    return _attend_raw(m, mass, acc, q, q_scale, k, base, offsets, visible)


@gluon.jit(do_not_specialize=["tasks", "q_heads", "block_table_stride"])
def attend_latents_by_groups_kernel(
    q_ptr, unit_ptr, records_ptr, tails_ptr, sinks_ptr, chunk_ptr, task_request_ptr, task_row_ptr, work_end_ptr,
    rows_ptr, prefix_ptr, length_ptr, own_start_ptr, sink_slot_ptr, query_start_ptr, block_table_ptr, partial_ptr,
    partial_lse_ptr, scale, tasks, q_heads, record_block_stride, record_tile_stride, tail_row_stride,
    sink_slot_stride, chunk_token_stride, block_table_stride,
    LATENT: gl.constexpr, ROPE: gl.constexpr, G: gl.constexpr, FIELDS: gl.constexpr, SCALES: gl.constexpr,
    ROPE_START: gl.constexpr, ROPE_FIELDS: gl.constexpr, ROPE_SCALES: gl.constexpr, GROUP: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, RING: gl.constexpr, TILES: gl.constexpr, TAIL: gl.constexpr,
    SINK: gl.constexpr, ROWS_IN_RING: gl.constexpr, CANONICAL: gl.constexpr, RAW_BLOCK: gl.constexpr,
    TASK_BLOCK: gl.constexpr, SHARE: gl.constexpr, CHAINED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `kernels.latent.attend.attend_latents_kernel`, for LATENT of 512 in 4 bits, ROPE of 64, G of 128."""
    allow_next(CHAINED)
    program = gl.program_id(0)
    head_block = gl.program_id(1)
    of_columns: gl.constexpr = gl.SliceLayout(1, groups_mma(TOKENS))
    of_output: gl.constexpr = groups_mma(HALF)
    column = gl.arange(0, COLUMNS, layout=of_columns)
    channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, of_output))
    ROW: gl.constexpr = LATENT + ROPE
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
        # queries are loaded while these are on their way
        k, vectors, rope_vectors, words = begin_records(
            records_ptr, table, begin, gl.minimum(end, tiles), record_block_stride, record_tile_stride, TILES, FIELDS,
            SCALES, ROPE_START, ROPE_FIELDS, ROPE_SCALES,
        )  # fmt: skip
        wait_for_previous(CHAINED)
        q_row = (query_start + row).to(gl.int64) * q_heads + head_block * GROUP + column % GROUP
        q, q_unit = load_queries(q_ptr, unit_ptr, q_row, col_ok)
        q_scale = q_unit * (scale * LOG2E)
        m, mass, acc = _attend_records(
            k, vectors, rope_vectors, words, records_ptr, table, begin, gl.minimum(end, tiles), sinks,
            record_stop, q, q_scale, record_block_stride, record_tile_stride, TILES, FIELDS, SCALES, ROPE_START,
            ROPE_FIELDS, ROPE_SCALES, ROWS > 1,
        )  # fmt: skip
        if SINK > 0:  # noqa: SIM102 (joined, the body would be compiled for no sinks too)
            if (begin <= tiles) & (tiles < end) & (tiles > 0) & (sink_slot >= 0):
                m, mass, acc = _attend_sinks(
                    m, mass, acc, q, q_scale, k, sinks_ptr + sink_slot * sink_slot_stride, record_stop,
                    SINK,
                )  # fmt: skip
        base = tails_ptr + ring_row * tail_row_stride
        m, mass, acc = _attend_rows(
            m, mass, acc, q, q_scale, k, base, gl.maximum(begin - tiles, 0),
            gl.minimum(end - tiles, ring_units), raw_start, ring_end, 0, ROW, record_stop, position, col_ok, RING,
            RAW_BLOCK,
        )  # fmt: skip
        if not ROWS_IN_RING:
            seen = tiles + ring_units
            base = chunk_ptr + query_start.to(gl.int64) * chunk_token_stride
            m, mass, acc = _attend_rows(
                m, mass, acc, q, q_scale, k, base, gl.maximum(begin - seen, 0),
                gl.minimum(end - seen, chunk_units), chunk_start, length, prefix, chunk_token_stride, record_stop,
                position, col_ok, 0, RAW_BLOCK,
            )  # fmt: skip

        total = gl.convert_layout(gl.sum(gl.sum(mass, axis=2), axis=1), of_columns)
        out_row = ((program + task).to(gl.int64) * gl.num_programs(1) + head_block) * COLUMNS + column
        lse = gl.where(total > 0, m + gl.log2(gl.maximum(total, 1e-37)) - WEIGHT_SHIFT, float("-inf"))
        gl.store(partial_lse_ptr + out_row, lse, mask=col_ok)
        mask = gl.convert_layout(col_ok & (total > 0), gl.SliceLayout(1, of_output))[:, None]
        at = gl.convert_layout(out_row, gl.SliceLayout(1, of_output))[:, None] * LATENT + channel[None, :]
        total = gl.convert_layout(gl.maximum(total, 1e-37), gl.SliceLayout(1, of_output))[:, None]
        gl.store(partial_ptr + at, acc[0] / total, mask=mask)
        gl.store(partial_ptr + HALF + at, acc[1] / total, mask=mask)
    wait_for_previous(CHAINED)
