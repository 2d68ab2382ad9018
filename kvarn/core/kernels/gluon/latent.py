"""Attention over latent records with layouts chosen by hand: what `kernels.latent.attend` computes.

Columns stand on the narrow side of both MMAs, as in `gluon.attend`. Codes are unpacked twice, in registers: as rows of
tokens for the product with queries, and transposed, two tokens a register, for the product with weights. Nothing but
words is read from shared memory for either.

Channels go in blocks of 64, as the planes of 64 words give them: block b is what plane ``b // CHUNKS`` of words
``64 * (b % CHUNKS)`` and on carries.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kvarn.core.kernels.address import find_record
from kvarn.core.kernels.chain import allow_next, wait_for_previous
from kvarn.core.kernels.gluon.codes import CODE_UNIT, code_weight, codes_of_plane, joined_codes
from kvarn.core.kernels.gluon.latent_rows import BLOCK, allocate_blocks, attend_rows, attend_sinks, tile_shared
from kvarn.core.kernels.gluon.layouts import (
    mma_layout,
    plain_shared,
    query_load_layout,
    repeat_layout,
    words_layout,
)
from kvarn.core.kernels.gluon.program import span_of, take_room
from kvarn.core.kernels.gluon.record import (
    copy_rows,
    copy_vectors,
    halves,
    repeat,
)
from kvarn.core.kernels.task import LOG2E, NEVER, WEIGHT_SHIFT, load_task, part_of_task, wait_for_records
from kvarn.core.kernels.unpack import planes
from kvarn.core.kernels.work import reading_of_task

_WIDTH = gl.constexpr(8)


@gluon.constexpr_function
def queries_shared():
    """Return the layout of queries in shared memory, [channels, columns]: channels inside, as operands are read."""
    return gl.SwizzledSharedLayout(32, 1, 2, [0, 1])


@gluon.jit
def _load_queries(q_ptr, q_row, ok, q_blocks, warps: gl.constexpr):
    """Load a task's queries, already rotated, into shared memory, [blocks, 64, columns]: rope part last."""
    BLOCKS: gl.constexpr = q_blocks.shape[0]
    layout: gl.constexpr = query_load_layout(BLOCK, _WIDTH, warps)
    at = gl.convert_layout(q_row, gl.SliceLayout(0, layout)) * (BLOCKS * BLOCK)
    mask = gl.convert_layout(ok, gl.SliceLayout(0, layout))
    channel = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))
    for b in gl.static_range(BLOCKS):
        q = gl.load(q_ptr + at[None, :] + (b * BLOCK + channel)[:, None], mask=mask[None, :], other=0.0)
        q_blocks.index(b).store(q)


@gluon.jit
def _copy_codes(words, vectors, slot, record, FIELDS: gl.constexpr, SCALES: gl.constexpr, warps: gl.constexpr):
    """Begin to copy the codes of a record's latents, and their scales and offsets into a slot."""
    ptr = record.to(gl.pointer_type(gl.int16)) + FIELDS[0][2] // 2
    for c in gl.static_range(len(words)):
        copy_rows(words[c], ptr + c * BLOCK, FIELDS[0][3], warps)
    copy_vectors(vectors, slot, record, SCALES, warps)


@gluon.jit
def _copy_rope(
    rope, vectors, slot, record, START: gl.constexpr, FIELDS: gl.constexpr, SCALES: gl.constexpr, warps: gl.constexpr
):
    """Begin to copy the rope part of a record: fp16, or codes with scales and offsets."""
    if len(FIELDS) == 0:
        copy_rows(rope, record.to(gl.pointer_type(gl.float16)) + START // 2, rope.shape[1], warps)
    else:
        copy_rows(rope, record.to(gl.pointer_type(gl.int16)) + START // 2, rope.shape[1], warps)
        copy_vectors(vectors, slot, record, SCALES, warps)


@gluon.jit
def _plane(words, BITS: gl.constexpr, PLANE: gl.constexpr, layout: gl.constexpr):
    """Return one plane of packed words as an MMA's left operand."""
    return gl.convert_layout(codes_of_plane(words, BITS, PLANE), layout, assert_trivial=True)


@gluon.jit
def _fold_block(x, owed, codes, q, vectors, slot, B: gl.constexpr, WEIGHT: gl.constexpr, warps: gl.constexpr):
    """Add the product of block B's unpacked codes, [tokens, 64], with their queries, [64, columns].

    owed: what every token owes for offsets, [16, columns] of equal rows.
    """
    mma: gl.constexpr = mma_layout(warps)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, _WIDTH)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, _WIDTH)
    scale = vectors[0].index(slot).slice(B * BLOCK, BLOCK).load(gl.SliceLayout(1, right))
    offset = vectors[1].index(slot).slice(B * BLOCK, BLOCK).load(gl.SliceLayout(0, left))
    q = q.load(right)
    scaled = q * WEIGHT * scale[:, None]
    _, offset = gl.broadcast(gl.zeros((16, BLOCK), gl.float16, left), offset[None, :])
    return mma_v2(codes, scaled, x), mma_v2(offset, q, owed)


@gluon.jit
def _logits(
    words, vectors, rope, rope_vectors, slot, q_blocks, FIELDS: gl.constexpr, ROPE_FIELDS: gl.constexpr,
    warps: gl.constexpr,
):  # fmt: skip
    """Return q . k of the tokens of a record in shared memory, [G, columns], as an MMA's result."""
    G: gl.constexpr = rope.shape[0]
    CHUNKS: gl.constexpr = len(words)
    ROPE_BLOCK: gl.constexpr = q_blocks.shape[0] - 1
    C: gl.constexpr = q_blocks.shape[2]
    mma: gl.constexpr = mma_layout(warps)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, _WIDTH)
    narrow_left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    narrow_right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    x = gl.zeros((G, C), gl.float32, mma)
    owed = gl.zeros((16, C), gl.float32, mma)
    for c in gl.static_range(CHUNKS):
        packed = words[c].load(words_layout(G, BLOCK, _WIDTH, warps))
        for plane in gl.static_range(planes(FIELDS[0][0])):
            x, owed = _fold_block(
                x, owed, _plane(packed, FIELDS[0][0], plane, left), q_blocks.index(plane * CHUNKS + c), vectors, slot,
                plane * CHUNKS + c, code_weight(FIELDS[0][1], plane * FIELDS[0][0]), warps,
            )  # fmt: skip
    if len(ROPE_FIELDS) == 0:
        x = mma_v2(rope.load(narrow_left), q_blocks.index(ROPE_BLOCK).load(narrow_right), x * CODE_UNIT)
    else:
        packed = rope.load(words_layout(G, rope.shape[1], _WIDTH, warps))
        # codes of 8 bits stand at the same place of the mantissa in both planes
        x, owed = _fold_block(
            x, owed, joined_codes(packed, 8, left), q_blocks.index(ROPE_BLOCK), rope_vectors, slot, 0,
            code_weight(0, 0), warps,
        )  # fmt: skip
        x *= CODE_UNIT
    repeated: gl.constexpr = repeat_layout(G, C, warps)
    debt, _ = halves(owed, repeated)
    return x + repeat(debt, G, repeated, mma)


@gluon.jit
def _weigh_block(
    acc, words, p, sums, decay, vectors, slot, B: gl.constexpr, PLANE: gl.constexpr, BITS: gl.constexpr,
    LOW_BIT: gl.constexpr, warps: gl.constexpr,
):  # fmt: skip
    """Let block B of the output decay, and add the sum of weight * latent over a record's tokens.

    words: of 64 rows, transposed, [64, tokens]; p: weights, [tokens, columns]; sums: of the weights, in equal rows.
    """
    mma: gl.constexpr = mma_layout(warps)
    codes = _plane(words, BITS, PLANE, gl.DotOperandLayout(0, mma, 2))
    o = mma_v2(codes, p, gl.zeros((BLOCK, p.shape[1]), gl.float32, mma))
    scale = vectors[0].index(slot).slice(B * BLOCK, BLOCK).load(gl.SliceLayout(1, mma)).to(gl.float32)
    offset = vectors[1].index(slot).slice(B * BLOCK, BLOCK).load(gl.SliceLayout(1, mma)).to(gl.float32)
    scale *= code_weight(LOW_BIT, PLANE * BITS) * CODE_UNIT
    return acc * decay[None, :] + offset[:, None] * sums + scale[:, None] * o


@gluon.jit
def _zero_blocks(BLOCKS: gl.constexpr, C: gl.constexpr, mma: gl.constexpr):
    blocks = ()
    for _block in gl.static_range(BLOCKS):
        blocks = blocks + (gl.zeros((BLOCK, C), gl.float32, mma),)
    return blocks


@gluon.jit
def _begin_records(
    records_ptr, table, begin, stop, block_stride, tile_stride, G: gl.constexpr, LATENT: gl.constexpr,
    TILES: gl.constexpr, FIELDS: gl.constexpr, SCALES: gl.constexpr, ROPE: gl.constexpr, ROPE_START: gl.constexpr,
    ROPE_FIELDS: gl.constexpr, ROPE_SCALES: gl.constexpr, warps: gl.constexpr,
):  # fmt: skip
    """Begin to copy tile `begin` of a request, if it is before stop. Return memory of codes, scales and rope part."""
    CHUNKS: gl.constexpr = FIELDS[0][3] // BLOCK
    words = allocate_blocks(CHUNKS, G, gl.int16)
    vectors = (
        gl.allocate_shared_memory(gl.float16, [2, LATENT], plain_shared(1)),
        gl.allocate_shared_memory(gl.float16, [2, LATENT], plain_shared(1)),
    )
    rope_vectors = vectors
    if len(ROPE_FIELDS) == 0:
        rope = gl.allocate_shared_memory(gl.float16, [G, ROPE], tile_shared())
    else:
        rope = gl.allocate_shared_memory(gl.int16, [G, ROPE_FIELDS[0][3]], plain_shared(2))
        rope_vectors = (
            gl.allocate_shared_memory(gl.float16, [2, ROPE], plain_shared(1)),
            gl.allocate_shared_memory(gl.float16, [2, ROPE], plain_shared(1)),
        )
    if begin < stop:
        record = find_record(records_ptr, gl.load(table + begin), 0, block_stride, tile_stride, 0, TILES)
        _copy_rope(rope, rope_vectors, 0, record, ROPE_START, ROPE_FIELDS, ROPE_SCALES, warps)
        _copy_codes(words, vectors, 0, record, FIELDS, SCALES, warps)
    async_copy.commit_group()
    return words, vectors, rope, rope_vectors


@gluon.jit
def _attend_records(
    words, vectors, rope, rope_vectors, records_ptr, table, begin, stop, sinks, record_stop, q_blocks, q_scale,
    block_stride, tile_stride,
    LATENT: gl.constexpr, G: gl.constexpr, TILES: gl.constexpr, FIELDS: gl.constexpr, SCALES: gl.constexpr,
    ROPE: gl.constexpr, ROPE_START: gl.constexpr, ROPE_FIELDS: gl.constexpr, ROPE_SCALES: gl.constexpr,
    MASK_COLUMNS: gl.constexpr, warps: gl.constexpr,
):  # fmt: skip
    """Attend tiles begin to stop of a request from their records. Return running maximum, sum and blocks of output.

    sinks: tokens at the request's beginning that are read elsewhere; record_stop: [columns], where each column's
    reading of records ends, looked at with MASK_COLUMNS.
    """
    C: gl.constexpr = q_blocks.shape[2]
    CHUNKS: gl.constexpr = FIELDS[0][3] // BLOCK
    BLOCKS: gl.constexpr = LATENT // BLOCK
    mma: gl.constexpr = mma_layout(warps)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    repeated: gl.constexpr = repeat_layout(BLOCK, C, warps)
    tokens = gl.arange(0, G, layout=gl.SliceLayout(1, mma))
    m = gl.full((C,), NEVER, gl.float32, gl.SliceLayout(0, mma))
    mass = gl.zeros((8, C), gl.float32, gl.SliceLayout(0, repeated))
    acc = _zero_blocks(BLOCKS, C, mma)
    page = gl.load(table + gl.maximum(gl.minimum(begin + 1, stop - 1), 0))
    slot = 0
    for tile in range(begin, stop):
        record = find_record(records_ptr, page, 0, block_stride, tile_stride, 0, TILES)
        page = gl.load(table + gl.minimum(tile + 2, stop - 1))
        async_copy.wait_group(0)
        x = _logits(words, vectors, rope, rope_vectors, slot, q_blocks, FIELDS, ROPE_FIELDS, warps)
        if tile + 1 < stop:
            _copy_rope(rope, rope_vectors, 1 - slot, record, ROPE_START, ROPE_FIELDS, ROPE_SCALES, warps)
        if tile * G < sinks:
            x = gl.where((tile * G + tokens >= sinks)[:, None], x, float("-inf"))
        if MASK_COLUMNS:
            x = gl.where(((tile + 1) * G <= record_stop)[None, :], x, float("-inf"))
        m_new = gl.maximum(m, gl.max(x, axis=0) * q_scale)
        decay = gl.exp2(m - m_new)
        p = gl.exp2(x * q_scale[None, :] - (m_new - WEIGHT_SHIFT)[None, :]).to(gl.float16)
        p = gl.convert_layout(p, right)
        added, _ = halves(
            mma_v2(gl.full((16, G), 1.0, gl.float16, left), p, gl.zeros((16, C), gl.float32, mma)), repeated
        )
        mass = mass * gl.convert_layout(decay, gl.SliceLayout(0, mass.type.layout))[None, :] + added
        sums = repeat(added, BLOCK, repeated, mma)
        turned = ()
        for c in gl.static_range(CHUNKS):
            turned = turned + (words[c].permute((1, 0)).load(left),)
        if tile + 1 < stop:
            _copy_codes(words, vectors, 1 - slot, record, FIELDS, SCALES, warps)
        async_copy.commit_group()
        new = ()
        for b in gl.static_range(BLOCKS):
            new = new + (
                _weigh_block(
                    acc[b], turned[b % CHUNKS], p, sums, decay, vectors, slot, b, b // CHUNKS, FIELDS[0][0],
                    FIELDS[0][1], warps,
                ),
            )  # fmt: skip
        acc = new
        m = m_new
        slot = 1 - slot
    return m, gl.convert_layout(gl.max(mass, axis=0), gl.SliceLayout(0, mma)), acc


@gluon.jit(do_not_specialize=["tasks", "q_heads", "block_table_stride"])
def attend_latents_kernel(
    q_ptr, unit_ptr, records_ptr, tails_ptr, sinks_ptr, chunk_ptr, task_request_ptr, task_row_ptr, work_end_ptr,
    rows_ptr, prefix_ptr, length_ptr, own_start_ptr, sink_slot_ptr, query_start_ptr, block_table_ptr, partial_ptr,
    partial_lse_ptr, scale, tasks, q_heads, record_block_stride, record_tile_stride, tail_row_stride,
    sink_slot_stride, chunk_token_stride, block_table_stride,
    LATENT: gl.constexpr, ROPE: gl.constexpr, G: gl.constexpr, FIELDS: gl.constexpr, SCALES: gl.constexpr,
    ROPE_START: gl.constexpr, ROPE_FIELDS: gl.constexpr, ROPE_SCALES: gl.constexpr, GROUP: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, RING: gl.constexpr, TILES: gl.constexpr, TAIL: gl.constexpr,
    SINK: gl.constexpr, ROWS_IN_RING: gl.constexpr, CANONICAL: gl.constexpr, RAW_BLOCK: gl.constexpr,
    TASK_BLOCK: gl.constexpr, SHARE: gl.constexpr, ROOM: gl.constexpr, CHAINED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `kernels.latent.attend.attend_latents_kernel`. ROOM: as of `kernels.gluon.attend.attend_kernel`."""
    allow_next(CHAINED)
    take_room(tasks, ROOM, num_warps)
    program = gl.program_id(0)
    head_block = gl.program_id(1)
    mma: gl.constexpr = mma_layout(num_warps)
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, mma))
    channel = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, mma))
    ROW: gl.constexpr = LATENT + ROPE
    BLOCKS: gl.constexpr = LATENT // BLOCK
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
        words, vectors, rope_codes, rope_vectors = _begin_records(
            records_ptr, table, begin, gl.minimum(end, tiles), record_block_stride, record_tile_stride, G, LATENT,
            TILES, FIELDS, SCALES, ROPE, ROPE_START, ROPE_FIELDS, ROPE_SCALES, num_warps,
        )  # fmt: skip
        wait_for_previous(CHAINED)
        q_row = (query_start + row).to(gl.int64) * q_heads + head_block * GROUP + column % GROUP
        q_blocks = gl.allocate_shared_memory(gl.float16, [BLOCKS + 1, BLOCK, COLUMNS], queries_shared())
        _load_queries(q_ptr, q_row, col_ok, q_blocks, num_warps)
        q_scale = gl.load(unit_ptr + q_row, mask=col_ok, other=0.0) * (scale * LOG2E)
        m, total, acc = _attend_records(
            words, vectors, rope_codes, rope_vectors, records_ptr, table, begin, gl.minimum(end, tiles), sinks,
            record_stop, q_blocks, q_scale, record_block_stride, record_tile_stride, LATENT, G, TILES, FIELDS,
            SCALES, ROPE, ROPE_START, ROPE_FIELDS, ROPE_SCALES, ROWS > 1, num_warps,
        )  # fmt: skip

        latent = allocate_blocks(BLOCKS, BLOCK, tails_ptr.dtype.element_ty)
        rope = gl.allocate_shared_memory(tails_ptr.dtype.element_ty, [BLOCK, ROPE], tile_shared())
        if SINK > 0:  # noqa: SIM102 (joined, the body would be compiled for no sinks too)
            if (begin <= tiles) & (tiles < end) & (tiles > 0) & (sink_slot >= 0):
                m, total, acc = attend_sinks(
                    m, total, acc, q_blocks, q_scale, latent, rope, sinks_ptr + sink_slot * sink_slot_stride,
                    record_stop, SINK, num_warps,
                )  # fmt: skip
        base = tails_ptr + ring_row * tail_row_stride
        m, total, acc = attend_rows(
            m, total, acc, q_blocks, q_scale, latent, rope, base, gl.maximum(begin - tiles, 0),
            gl.minimum(end - tiles, ring_units), raw_start, ring_end, 0, ROW, record_stop, position, col_ok, RING,
            RAW_BLOCK, num_warps,
        )  # fmt: skip
        if not ROWS_IN_RING:
            seen = tiles + ring_units
            base = chunk_ptr + query_start.to(gl.int64) * chunk_token_stride
            m, total, acc = attend_rows(
                m, total, acc, q_blocks, q_scale, latent, rope, base, gl.maximum(begin - seen, 0),
                gl.minimum(end - seen, chunk_units), chunk_start, length, prefix, chunk_token_stride, record_stop,
                position, col_ok, 0, RAW_BLOCK, num_warps,
            )  # fmt: skip

        out_row = ((program + task).to(gl.int64) * gl.num_programs(1) + head_block) * COLUMNS + column
        lse = gl.where(total > 0, m + gl.log2(gl.maximum(total, 1e-37)) - WEIGHT_SHIFT, float("-inf"))
        gl.store(partial_lse_ptr + out_row, lse, mask=col_ok)
        mask = (col_ok & (total > 0))[None, :]
        for b in gl.static_range(BLOCKS):
            out_ptrs = partial_ptr + out_row[None, :] * LATENT + (b * BLOCK + channel)[:, None]
            gl.store(out_ptrs, acc[b] / gl.maximum(total, 1e-37)[None, :], mask=mask)
    wait_for_previous(CHAINED)
