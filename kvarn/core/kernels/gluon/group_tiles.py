"""Tiles of latents by the MMAs of Hopper's warp groups, for 64 query columns: both products have one restored record.

Columns are rows of the MMAs of two warp groups. A tile goes from packed words in registers to latents in fp16 in shared
memory, in blocks of 64 channels with the rope part as the last, where both products find it: 64 columns by 128 tokens,
then 64 columns by 256 channels, twice. MMAs run beside the restoring: while the output takes up the second half of a
tile, the next tile's first half replaces what it has taken, and while logits take up that, the second half is restored.

Raw rows take the same way, 128 at a time, without a next.
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
from kvarn.core.kernels.gluon.attend import row_offsets
from kvarn.core.kernels.gluon.codes import plane_step, restored
from kvarn.core.kernels.gluon.layouts import plain_shared
from kvarn.core.kernels.gluon.record import copy_rows, copy_vectors
from kvarn.core.kernels.task import NEVER, WEIGHT_SHIFT
from kvarn.core.kernels.unpack import side_by_side

WARPS = gl.constexpr(8)
# Query columns of a program; tokens that it takes at a time; channels of a block of shared memory, of a plane of
# latents, of two planes.
COLUMNS = gl.constexpr(64)
TOKENS = gl.constexpr(128)
BLOCK = gl.constexpr(64)
PLANE = gl.constexpr(128)
HALF = gl.constexpr(256)
# Blocks of a row: the last one is the rope part.
BLOCKS = gl.constexpr(9)
# A running maximum grows once logits are so much larger, in powers of two: weights stay inside fp16, and few tiles have
# the output decay.
_SLACK = gl.constexpr(8.0)


@gluon.constexpr_function
def groups_mma(width):
    """Return the layout of MMAs' results, [columns, tokens or channels]: a half of the latter for each group."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, width // 2, 16])


@gluon.constexpr_function
def _operand_shared():
    return gl.NVMMASharedLayout(128, 16, rank=2)


@gluon.constexpr_function
def _rows_layout(width, warps):
    """Return the layout of rows of numbers on their way to shared memory: 16 bytes of halfs a thread."""
    across = min(16, width // 8)
    return gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def _allocate_rows(ROWS: gl.constexpr):
    """Return shared memory for rows of latents and rope parts in blocks of channels, [blocks, rows, 64]."""
    return gl.allocate_shared_memory(gl.float16, [BLOCKS, ROWS, BLOCK], _operand_shared())


@gluon.jit
def _parts(blocks, WIDTH: gl.constexpr):
    """Return the same memory with neighbouring blocks of latents side by side, [parts, rows, WIDTH]."""
    shape: gl.constexpr = (8 * BLOCK // WIDTH, blocks.shape[1], WIDTH)
    return blocks._reinterpret(gl.float16, shape, _operand_shared())


@gluon.jit
def _load_rows(ptr, offsets, ok, WIDTH: gl.constexpr):
    """Load rows of WIDTH numbers, which start at offsets, as fp16; zeros if not ok."""
    layout: gl.constexpr = _rows_layout(WIDTH, WARPS)
    channel = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    at = gl.convert_layout(offsets, gl.SliceLayout(1, layout))
    mask = gl.convert_layout(ok, gl.SliceLayout(1, layout))
    rows = gl.load(ptr + (at[:, None] + channel[None, :]), mask=mask[:, None], other=0.0)
    return rows.to(gl.float32).to(gl.float16)


@gluon.jit
def _store_rows(blocks, ptr, offsets, ok):
    """Bring rows, which start at offsets after ptr, to shared memory."""
    for plane in gl.static_range(4):
        _parts(blocks, PLANE).index(plane).store(_load_rows(ptr + plane * PLANE, offsets, ok, PLANE))
    blocks.index(8).store(_load_rows(ptr + 4 * PLANE, offsets, ok, BLOCK))


@gluon.jit
def load_queries_of_groups(q_ptr, unit_ptr, q_row, ok):
    """Load a task's queries, already rotated, into shared memory, [blocks, columns, 64]. Return it, and units.

    q_row, ok: [columns]; units: [columns], what queries are divided by.
    """
    unit = gl.load(unit_ptr + q_row, mask=ok, other=0.0)
    q = _allocate_rows(COLUMNS)
    _store_rows(q, q_ptr, q_row * (BLOCKS * BLOCK), ok)
    return q, gl.maximum(unit, 1e-30)


@gluon.jit
def _load_words(record, wanted, FIELDS: gl.constexpr):
    """Load a record's packed words, [tokens, 128], into registers."""
    layout: gl.constexpr = _rows_layout(PLANE, WARPS)
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, layout))
    word = gl.arange(0, PLANE, layout=gl.SliceLayout(0, layout))
    ptr = record.to(gl.pointer_type(gl.int16)) + FIELDS[0][2] // 2
    return gl.load(ptr + (token * PLANE)[:, None] + word[None, :], mask=wanted, other=0)


@gluon.jit
def _prefetch_lines(ptr, COUNT: gl.constexpr):
    """Begin to bring so many lines of 128 bytes to the L2 cache. ptr: of halfs."""
    line = gl.arange(0, COUNT, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptr + line * 64], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _prefetch(record, FIELDS: gl.constexpr, ROPE_START: gl.constexpr, ROPE_FIELDS: gl.constexpr):
    """Begin to bring a record's words and rope part to the L2 cache.

    They are read once there is room for them; loads begun before would have to end before the next fence.
    """
    halfs = record.to(gl.pointer_type(gl.float16))
    _prefetch_lines(halfs + FIELDS[0][2] // 2, TOKENS * PLANE // 64)
    _prefetch_lines(halfs + ROPE_START // 2, TOKENS if len(ROPE_FIELDS) == 0 else TOKENS // 2)


@gluon.jit
def _load_rope_words(record, wanted, START: gl.constexpr, FIELDS: gl.constexpr):
    """Load the packed words of a record's rope part, [tokens, 32], if it has codes."""
    WORDS: gl.constexpr = FIELDS[0][3] if len(FIELDS) > 0 else 8
    layout: gl.constexpr = _rows_layout(WORDS, WARPS)
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, layout))
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, layout))
    packed = gl.zeros((TOKENS, WORDS), gl.int16, layout)
    if len(FIELDS) > 0:
        ptr = record.to(gl.pointer_type(gl.int16)) + START // 2
        packed = gl.load(ptr + (token * WORDS)[:, None] + word[None, :], mask=wanted, other=0)
    return packed


@gluon.jit
def _copy_rope(k, record, wanted, START: gl.constexpr, FIELDS: gl.constexpr):
    """Begin to copy the rope part of a record, if it has no codes."""
    if len(FIELDS) == 0:  # noqa: SIM102 (a constant and a condition of the kernel)
        if wanted:
            copy_rows(k.index(8), record.to(gl.pointer_type(gl.float16)) + START // 2, BLOCK, WARPS)
    async_copy.commit_group()


@gluon.jit
def _copy_scales(
    vectors, rope_vectors, slot, record, wanted, SCALES: gl.constexpr, ROPE_FIELDS: gl.constexpr,
    ROPE_SCALES: gl.constexpr,
):  # fmt: skip
    """Begin to copy the scales and offsets of a record into a slot."""
    if wanted:
        copy_vectors(vectors, slot, record, SCALES, WARPS)
        if len(ROPE_FIELDS) > 0:
            copy_vectors(rope_vectors, slot, record, ROPE_SCALES, WARPS)
    async_copy.commit_group()


@gluon.jit
def _restored_plane(words, vectors, BITS: gl.constexpr, INDEX: gl.constexpr):
    """Return the channels of one plane of packed words, [tokens, words], fp16."""
    W: gl.constexpr = words.shape[1]
    layout: gl.constexpr = words.type.layout
    row: gl.constexpr = gl.SliceLayout(0, layout)
    scale = vectors[0].slice(INDEX * W, W).load(row) * plane_step(BITS, INDEX)
    offset = vectors[1].slice(INDEX * W, W).load(row)
    zeros = gl.zeros((TOKENS, W), gl.float16, layout)
    scale, _ = gl.broadcast(scale[None, :], zeros)
    offset, _ = gl.broadcast(offset[None, :], zeros)
    return restored(words, scale, offset, BITS, INDEX)


@gluon.jit
def _restore_rope(k, words, rope_vectors, FIELDS: gl.constexpr):
    """Restore the rope part of a record, if it has codes, to where it is copied if not."""
    if len(FIELDS) > 0:
        first = _restored_plane(words, rope_vectors, 8, 0)
        k.index(8).store(side_by_side(first, _restored_plane(words, rope_vectors, 8, 1)))


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
    shared = k.index(8)._reinterpret(gl.float16, (COLUMNS, TOKENS), _operand_shared())
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
def begin_records_of_groups(
    records_ptr, table, begin, stop, block_stride, tile_stride, TILES: gl.constexpr, FIELDS: gl.constexpr,
    SCALES: gl.constexpr, ROPE_START: gl.constexpr, ROPE_FIELDS: gl.constexpr, ROPE_SCALES: gl.constexpr,
):  # fmt: skip
    """Begin to read tile `begin` of a request, if it is before stop.

    Return memory of a tile, memory of scales and offsets, and packed words in registers.
    """
    k = _allocate_rows(TOKENS)
    vectors = (
        gl.allocate_shared_memory(gl.float16, [2, 4 * PLANE], plain_shared(1)),
        gl.allocate_shared_memory(gl.float16, [2, 4 * PLANE], plain_shared(1)),
    )
    rope_vectors = vectors
    if len(ROPE_FIELDS) > 0:
        rope_vectors = (
            gl.allocate_shared_memory(gl.float16, [2, BLOCK], plain_shared(1)),
            gl.allocate_shared_memory(gl.float16, [2, BLOCK], plain_shared(1)),
        )
    wanted = begin < stop
    page = gl.load(table + begin, mask=wanted, other=0)
    record = find_record(records_ptr, page, 0, block_stride, tile_stride, 0, TILES)
    _copy_scales(vectors, rope_vectors, 0, record, wanted, SCALES, ROPE_FIELDS, ROPE_SCALES)
    words = (_load_words(record, wanted, FIELDS), _load_rope_words(record, wanted, ROPE_START, ROPE_FIELDS))
    _copy_rope(k, record, wanted, ROPE_START, ROPE_FIELDS)
    return k, vectors, rope_vectors, words


@gluon.jit
def attend_records_by_groups(
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
    planes = _parts(k, PLANE)
    if begin < stop:
        page = gl.load(table + gl.minimum(begin + 1, stop - 1))
        async_copy.wait_group(0)
        scales = (vectors[0].index(0), vectors[1].index(0))
        for plane in gl.static_range(4):
            planes.index(plane).store(_restored_plane(words[0], scales, BITS, plane))
        _restore_rope(k, words[1], (rope_vectors[0].index(0), rope_vectors[1].index(0)), ROPE_FIELDS)
        x = _logits(q, k)
        slot = 0
        # x is of the tile before, whose latents stand in k
        for tile in range(begin + 1, stop):
            slot = 1 - slot
            record = find_record(records_ptr, page, 0, block_stride, tile_stride, 0, TILES)
            page = gl.load(table + gl.minimum(tile + 1, stop - 1))
            _copy_scales(vectors, rope_vectors, slot, record, True, SCALES, ROPE_FIELDS, ROPE_SCALES)
            _prefetch(record, FIELDS, ROPE_START, ROPE_FIELDS)
            x = _masked(x, tile - 1, sinks, record_stop, MASK_COLUMNS)
            m, mass, acc, p = _weights(m, mass, acc, x, q_scale, k)
            first, second = _weigh(acc, p, k)
            packed = _load_words(record, True, FIELDS)
            rope_packed = _load_rope_words(record, True, ROPE_START, ROPE_FIELDS)
            async_copy.wait_group(0)
            scales = (vectors[0].index(slot), vectors[1].index(slot))
            ahead = _restored_plane(packed, scales, BITS, 0)
            first, second, ahead = warpgroup_mma_wait(1, deps=[first, second, ahead])
            gl.thread_barrier()  # the other group's MMAs read there too
            planes.index(0).store(ahead)
            planes.index(1).store(_restored_plane(packed, scales, BITS, 1))
            _make_visible()
            x = _add_logits(warpgroup_mma_init(nothing), q, k, 0, 4)
            ahead = _restored_plane(packed, scales, BITS, 2)
            # all but the logits' four
            first, second, x, ahead = warpgroup_mma_wait(4, deps=[first, second, x, ahead])
            acc = (first, second)
            gl.thread_barrier()
            _copy_rope(k, record, True, ROPE_START, ROPE_FIELDS)
            planes.index(2).store(ahead)
            planes.index(3).store(_restored_plane(packed, scales, BITS, 3))
            _restore_rope(k, rope_packed, (rope_vectors[0].index(slot), rope_vectors[1].index(slot)), ROPE_FIELDS)
            async_copy.wait_group(0)
            _make_visible()
            x = warpgroup_mma_wait(0, deps=[_add_logits(warpgroup_mma_init(x), q, k, 4, BLOCKS)])
        x = _masked(x, stop - 1, sinks, record_stop, MASK_COLUMNS)
        m, mass, acc = _fold(m, mass, acc, x, q_scale, k)
    return m, mass, acc


@gluon.jit
def _weigh(acc, p, k):
    """Begin to add weight * latent of a tile to the output, a half of its channels after the other."""
    halves = _parts(k, HALF)
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
    _store_rows(k, base, offsets, offsets >= 0)
    return _fold(m, mass, acc, gl.where(visible, _logits(q, k), float("-inf")), q_scale, k)


@gluon.jit
def attend_rows_by_groups(
    m, mass, acc, q, q_scale, k, base, first, stop, start, end, origin, row_stride, record_stop,
    position, col_ok, RING: gl.constexpr, RAW_BLOCK: gl.constexpr,
):  # fmt: skip
    """Attend blocks first to stop of RAW_BLOCK rows at positions start to end, each column those that it may see."""
    row = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, groups_mma(TOKENS)))
    stored = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, _rows_layout(PLANE, WARPS)))
    stop_row = gl.minimum(start + stop * RAW_BLOCK, end)
    for at in range(start + first * RAW_BLOCK, stop_row, TOKENS):
        pos = at + row
        visible = (pos[None, :] >= record_stop[:, None]) & (pos[None, :] <= position[:, None])
        visible = visible & (pos < stop_row)[None, :] & col_ok[:, None]
        offsets = row_offsets(gl.minimum(at + stored, stop_row - 1), origin, row_stride, RING)
        m, mass, acc = _attend_raw(m, mass, acc, q, q_scale, k, base, offsets, visible)
    return m, mass, acc


@gluon.jit
def attend_sinks_by_groups(m, mass, acc, q, q_scale, k, base, record_stop, SINK: gl.constexpr):
    """Attend a request's sinks, each column that reads records: it would find them there."""
    row = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, groups_mma(TOKENS)))
    stored = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, _rows_layout(PLANE, WARPS)))
    visible = (row < SINK)[None, :] & (record_stop > 0)[:, None]
    offsets = gl.minimum(stored, SINK - 1) * (BLOCKS * BLOCK)
    return _attend_raw(m, mass, acc, q, q_scale, k, base, offsets, visible)
