"""Attention over latents by Hopper's warp groups, 64 query columns a program: what `kernels.latent.attend` computes.

Columns are rows of the MMAs of two groups that are specialised: each restores half the tokens of a tile, has their
logits, and takes turns with the other in the softmax (`latent_turns`). So one's MMAs run while the other restores or
weighs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

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
    allocate_rows,
    allocate_vectors,
    begin_records,
    blocks_together,
    copy_rope,
    copy_scales,
    groups_mma,
    load_queries,
    load_rope_words,
    load_words,
    prefetch_record,
    restore_rope,
    restored_plane,
    rows_layout,
    store_rows,
)
from kvarn.core.kernels.gluon.latent_turns import (
    allocate_barriers,
    begin_turn,
    end_turn,
    let_second_go_on,
    make_visible,
    meet,
    sums_by_thread,
    take_turn,
    wait_for_room,
)
from kvarn.core.kernels.gluon.layouts import plain_shared
from kvarn.core.kernels.gluon.program import span_of
from kvarn.core.kernels.task import LOG2E, NEVER, WEIGHT_SHIFT, load_task, part_of_task, wait_for_records
from kvarn.core.kernels.work import reading_of_task

# Of a thread: two groups have all of a multiprocessor's.
_REGISTERS = gl.constexpr(256)


@gluon.jit
def _add_logits(x, q, own, begin, end):
    """Begin to add the products of blocks begin to end of queries and of latents to logits, [columns, tokens]."""
    for b in range(begin, end):
        x = warpgroup_mma(q[0].index(b), own[0].index(b).permute((1, 0)), x, is_async=True)
    return x


@gluon.jit
def _last_logits(x, q, own, begin):
    """Add the products of blocks from begin on and of rope parts to logits, and wait for all."""
    x = _add_logits(x, q, own, begin, BLOCKS - 1)
    return warpgroup_mma_wait(0, deps=[warpgroup_mma(q[1], own[1].permute((1, 0)), x, is_async=True)])


@gluon.jit
def _logits(q, own):
    """Return q . k of tokens that were just brought to shared memory, [columns, tokens]."""
    make_visible()
    x = warpgroup_mma_init(gl.zeros((COLUMNS, TOKENS), gl.float32, groups_mma(TOKENS)))
    return _last_logits(x, q, own, 0)


@gluon.jit
def _masked(x, tile, sinks, record_stop, MASK_COLUMNS: gl.constexpr, WHICH: gl.constexpr):
    """Mask logits of a tile: tokens that are sinks, and columns that don't read the record."""
    if MASK_COLUMNS:
        x = gl.where(((tile + 1) * 2 * TOKENS <= record_stop)[:, None], x, float("-inf"))
    first = (2 * tile + WHICH) * TOKENS
    if first < sinks:
        token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, x.type.layout))
        x = gl.where((first + token >= sinks)[None, :], x, float("-inf"))
    return x


@gluon.jit
def _attend_records(
    memory, vectors, rope_vectors, fold, words, records_ptr, table, begin, stop, sinks, record_stop, q, q_scale,
    block_stride, tile_stride,
    TILES: gl.constexpr, FIELDS: gl.constexpr, SCALES: gl.constexpr, ROPE_START: gl.constexpr,
    ROPE_FIELDS: gl.constexpr, ROPE_SCALES: gl.constexpr, MASK_COLUMNS: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Attend tiles begin to stop of a request from their records, as `latent._attend_records` does.

    record_stop, q_scale: [columns]. Return the running maximum, what each thread sums, the output, and how many halves
    were folded.
    """
    own, bars = memory[0], memory[3]
    BITS: gl.constexpr = FIELDS[0][0]
    mma: gl.constexpr = groups_mma(TOKENS)
    nothing = gl.zeros((COLUMNS, TOKENS), gl.float32, mma)
    m = gl.full((COLUMNS,), NEVER, gl.float32, gl.SliceLayout(1, mma))
    mass = sums_by_thread(nothing)
    acc = gl.zeros((COLUMNS, HALF), gl.float32, groups_mma(HALF))
    planes = blocks_together(own, PLANE)
    scales = (vectors[0].index(WHICH), vectors[1].index(WHICH))
    rope_scales = (rope_vectors[0].index(WHICH), rope_vectors[1].index(WHICH))
    if begin < stop:
        page = gl.load(table + gl.minimum(begin + 1, stop - 1))
        async_copy.wait_group(0)
        for plane in gl.static_range(4):
            planes.index(plane).store(restored_plane(words[0], scales, BITS, plane))
        restore_rope(own, words[1], rope_scales, ROPE_FIELDS)
        x = _logits(q, own)
        # x is of the tile before, whose latents stand in own and other
        for tile in range(begin + 1, stop):
            record = find_record(records_ptr, page, 0, block_stride, tile_stride, 0, TILES)
            page = gl.load(table + gl.minimum(tile + 1, stop - 1))
            copy_scales(vectors, rope_vectors, record, True, SCALES, ROPE_FIELDS, ROPE_SCALES, WHICH)
            prefetch_record(record, FIELDS, ROPE_START, ROPE_FIELDS, WHICH)
            x = _masked(x, tile - 1, sinks, record_stop, MASK_COLUMNS, WHICH)
            m_first, m, mass, acc = begin_turn(m, mass, acc, x, q_scale, memory, fold, WHICH)
            packed = load_words(record, True, FIELDS, WHICH)
            rope_packed = load_rope_words(record, True, ROPE_START, ROPE_FIELDS, WHICH)
            m, mass, acc = end_turn(m_first, m, mass, acc, memory, fold, WHICH)
            if WHICH == 1:  # the last MMAs of the first group read the other half, and run on
                acc = warpgroup_mma_wait(0, deps=[acc])
            async_copy.wait_group(0)
            wait_for_room(bars, fold, WHICH)
            fold += 1
            copy_rope(own, record, True, ROPE_START, ROPE_FIELDS, WHICH)
            planes.index(0).store(restored_plane(packed, scales, BITS, 0))
            planes.index(1).store(restored_plane(packed, scales, BITS, 1))
            acc = warpgroup_mma_wait(0, deps=[acc])
            make_visible()
            let_second_go_on(bars, WHICH)
            x = _add_logits(warpgroup_mma_init(nothing), q, own, 0, 4)
            planes.index(2).store(restored_plane(packed, scales, BITS, 2))
            planes.index(3).store(restored_plane(packed, scales, BITS, 3))
            restore_rope(own, rope_packed, rope_scales, ROPE_FIELDS)
            async_copy.wait_group(0)
            make_visible()
            x = _last_logits(x, q, own, 4)
        x = _masked(x, stop - 1, sinks, record_stop, MASK_COLUMNS, WHICH)
        m, mass, acc = take_turn(m, mass, acc, x, q_scale, memory, fold, WHICH)
        fold += 1
    return m, mass, acc, fold


@gluon.jit
def _attend_raw(m, mass, acc, q, q_scale, memory, fold, base, offsets, visible, WHICH: gl.constexpr):
    """Fold a group's raw rows, 64 that start at offsets after base, into the running softmax.

    visible: [columns, rows]. Rows that no column sees repeat ones that are seen: no memory is read which nothing wrote.
    """
    store_rows(memory[0], base, offsets, offsets >= 0)
    x = gl.where(visible, _logits(q, memory[0]), float("-inf"))
    return take_turn(m, mass, acc, x, q_scale, memory, fold, WHICH)


@gluon.jit
def _attend_rows(
    m, mass, acc, q, q_scale, memory, fold, base, first, stop, start, end, origin, row_stride,
    record_stop, position, col_ok, RING: gl.constexpr, RAW_BLOCK: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Attend blocks first to stop of RAW_BLOCK rows at positions start to end, each column those that it may see."""
    row = WHICH * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, groups_mma(TOKENS)))
    stored = WHICH * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, rows_layout(PLANE)))
    stop_row = gl.minimum(start + stop * RAW_BLOCK, end)
    for at in range(start + first * RAW_BLOCK, stop_row, 2 * TOKENS):
        pos = at + row
        visible = (pos[None, :] >= record_stop[:, None]) & (pos[None, :] <= position[:, None])
        visible = visible & (pos < stop_row)[None, :] & col_ok[:, None]
        offsets = row_offsets(gl.minimum(at + stored, stop_row - 1), origin, row_stride, RING)
        m, mass, acc = _attend_raw(m, mass, acc, q, q_scale, memory, fold, base, offsets, visible, WHICH)
        fold += 1
    return m, mass, acc, fold


@gluon.jit
def _attend_sinks(m, mass, acc, q, q_scale, memory, fold, base, record_stop, SINK: gl.constexpr, WHICH: gl.constexpr):
    """Attend a request's sinks, each column that reads records: it would find them there."""
    row = WHICH * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, groups_mma(TOKENS)))
    stored = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, rows_layout(PLANE)))
    visible = (row < SINK)[None, :] & (record_stop > 0)[:, None]
    offsets = gl.minimum(stored, SINK - 1) * (BLOCKS * BLOCK)
    return _attend_raw(m, mass, acc, q, q_scale, memory, fold, base, offsets, visible, WHICH)


@gluon.jit
def _attend_as_group(
    q, own, other, vectors, rope_vectors, maxima, masses, bars, numbers,
    LATENT: gl.constexpr, ROPE: gl.constexpr, G: gl.constexpr, FIELDS: gl.constexpr, SCALES: gl.constexpr,
    ROPE_START: gl.constexpr, ROPE_FIELDS: gl.constexpr, ROPE_SCALES: gl.constexpr, GROUP: gl.constexpr,
    ROWS: gl.constexpr, RING: gl.constexpr, TILES: gl.constexpr, TAIL: gl.constexpr,
    SINK: gl.constexpr, ROWS_IN_RING: gl.constexpr, CANONICAL: gl.constexpr, RAW_BLOCK: gl.constexpr,
    TASK_BLOCK: gl.constexpr, SHARE: gl.constexpr, CHAINED: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Attend as one of two groups to a program's part of the work.

    own, other: memory of the group's half of a tile and of the other's; masses: of both groups' sums, [2, columns];
    numbers: the kernel's arguments that are no constants.
    """
    (
        q_ptr, unit_ptr, records_ptr, tails_ptr, sinks_ptr, chunk_ptr, task_request_ptr, task_row_ptr, work_end_ptr,
        rows_ptr, prefix_ptr, length_ptr, own_start_ptr, sink_slot_ptr, query_start_ptr, block_table_ptr, partial_ptr,
        partial_lse_ptr, scale, tasks, q_heads, record_block_stride, record_tile_stride, tail_row_stride,
        sink_slot_stride, chunk_token_stride, block_table_stride,
    ) = numbers  # fmt: skip
    program = gl.program_id(0)
    head_block = gl.program_id(1)
    of_columns: gl.constexpr = gl.SliceLayout(1, groups_mma(TOKENS))
    of_output: gl.constexpr = groups_mma(HALF)
    column = gl.arange(0, COLUMNS, layout=of_columns)
    channel = WHICH * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, of_output))
    ROW: gl.constexpr = LATENT + ROPE
    memory = (own, other, maxima, bars)
    # how many halves of each group were folded, and how often the groups met
    fold, met = 0, 0
    share_begin, share_end, first_task, last_task = span_of(
        program, gl.num_programs(0), work_end_ptr, tasks, TASK_BLOCK, SHARE, WARPS
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
        words = begin_records(
            own, vectors, rope_vectors, records_ptr, table, begin, gl.minimum(end, tiles), record_block_stride,
            record_tile_stride, TILES, FIELDS, SCALES, ROPE_START, ROPE_FIELDS, ROPE_SCALES, WHICH,
        )  # fmt: skip
        wait_for_previous(CHAINED)
        q_row = (query_start + row).to(gl.int64) * q_heads + head_block * GROUP + column % GROUP
        load_queries(q, q_ptr, q_row, col_ok, WHICH)
        unit = gl.load(unit_ptr + q_row, mask=col_ok, other=0.0)
        q_scale = gl.maximum(unit, 1e-30) * (scale * LOG2E)
        meet(bars, met)
        m, mass, acc, fold = _attend_records(
            memory, vectors, rope_vectors, fold, words, records_ptr, table, begin, gl.minimum(end, tiles), sinks,
            record_stop, q, q_scale, record_block_stride, record_tile_stride, TILES, FIELDS, SCALES, ROPE_START,
            ROPE_FIELDS, ROPE_SCALES, ROWS > 1, WHICH,
        )  # fmt: skip
        if SINK > 0:  # noqa: SIM102 (joined, the body would be compiled for no sinks too)
            if (begin <= tiles) & (tiles < end) & (tiles > 0) & (sink_slot >= 0):
                m, mass, acc = _attend_sinks(
                    m, mass, acc, q, q_scale, memory, fold, sinks_ptr + sink_slot * sink_slot_stride, record_stop, SINK,
                    WHICH,
                )  # fmt: skip
                fold += 1
        base = tails_ptr + ring_row * tail_row_stride
        m, mass, acc, fold = _attend_rows(
            m, mass, acc, q, q_scale, memory, fold, base, gl.maximum(begin - tiles, 0),
            gl.minimum(end - tiles, ring_units), raw_start, ring_end, 0, ROW, record_stop, position, col_ok, RING,
            RAW_BLOCK, WHICH,
        )  # fmt: skip
        if not ROWS_IN_RING:
            seen = tiles + ring_units
            base = chunk_ptr + query_start.to(gl.int64) * chunk_token_stride
            m, mass, acc, fold = _attend_rows(
                m, mass, acc, q, q_scale, memory, fold, base, gl.maximum(begin - seen, 0),
                gl.minimum(end - seen, chunk_units), chunk_start, length, prefix, chunk_token_stride, record_stop,
                position, col_ok, 0, RAW_BLOCK, WHICH,
            )  # fmt: skip

        total = gl.convert_layout(gl.sum(mass, axis=1), of_columns)
        masses.index(WHICH).store(total)
        meet(bars, met + 1)
        met += 2
        total += masses.index(1 - WHICH).load(of_columns)
        out_row = ((program + task).to(gl.int64) * gl.num_programs(1) + head_block) * COLUMNS + column
        if WHICH == 0:
            lse = gl.where(total > 0, m + gl.log2(gl.maximum(total, 1e-37)) - WEIGHT_SHIFT, float("-inf"))
            gl.store(partial_lse_ptr + out_row, lse, mask=col_ok)
        mask = gl.convert_layout(col_ok & (total > 0), gl.SliceLayout(1, of_output))[:, None]
        at = gl.convert_layout(out_row, gl.SliceLayout(1, of_output))[:, None] * LATENT + channel[None, :]
        total = gl.convert_layout(gl.maximum(total, 1e-37), gl.SliceLayout(1, of_output))[:, None]
        gl.store(partial_ptr + at, acc / total, mask=mask)
    wait_for_previous(CHAINED)


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
    """As `kernels.latent.attend.attend_latents_kernel`, for LATENT of 512 in 4 bits, ROPE of 64, G of 128.

    num_warps: of the first group; the second has as many.
    """
    allow_next(CHAINED)
    q = allocate_rows(COLUMNS)
    first, second = allocate_rows(TOKENS), allocate_rows(TOKENS)
    vectors = allocate_vectors(LATENT)
    rope_vectors = vectors
    if len(ROPE_FIELDS) > 0:
        rope_vectors = allocate_vectors(ROPE)
    maxima = gl.allocate_shared_memory(gl.float32, [2, COLUMNS], plain_shared(1))
    masses = gl.allocate_shared_memory(gl.float32, [2, COLUMNS], plain_shared(1))
    bars = allocate_barriers()
    numbers = (
        q_ptr, unit_ptr, records_ptr, tails_ptr, sinks_ptr, chunk_ptr, task_request_ptr, task_row_ptr, work_end_ptr,
        rows_ptr, prefix_ptr, length_ptr, own_start_ptr, sink_slot_ptr, query_start_ptr, block_table_ptr, partial_ptr,
        partial_lse_ptr, scale, tasks, q_heads, record_block_stride, record_tile_stride, tail_row_stride,
        sink_slot_stride, chunk_token_stride, block_table_stride,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                _attend_as_group,
                (
                    q, first, second, vectors, rope_vectors, maxima, masses, bars, numbers, LATENT, ROPE, G, FIELDS,
                    SCALES, ROPE_START, ROPE_FIELDS, ROPE_SCALES, GROUP, ROWS, RING, TILES, TAIL, SINK, ROWS_IN_RING,
                    CANONICAL, RAW_BLOCK, TASK_BLOCK, SHARE, CHAINED, 0,
                ),
            ),
            (
                _attend_as_group,
                (
                    q, second, first, vectors, rope_vectors, maxima, masses, bars, numbers, LATENT, ROPE, G, FIELDS,
                    SCALES, ROPE_START, ROPE_FIELDS, ROPE_SCALES, GROUP, ROWS, RING, TILES, TAIL, SINK, ROWS_IN_RING,
                    CANONICAL, RAW_BLOCK, TASK_BLOCK, SHARE, CHAINED, 1,
                ),
            ),
        ],
        [WARPS], [_REGISTERS],
    )  # fmt: skip
