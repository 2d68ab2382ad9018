"""Half a tile of latents in shared memory, which one of two warp groups brings there: restored records or raw rows.

Rows stand in blocks of 64 channels, and their rope parts in a block of their own. A record goes from packed words in
registers to latents in fp16, once for both products; raw rows take the same place, 64 at a time. Queries stand beside
them. Memory of rows is (latents, rope parts).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kvarn.core.kernels.address import find_record
from kvarn.core.kernels.gluon.codes import plane_step, restored
from kvarn.core.kernels.gluon.layouts import plain_shared, seen_as
from kvarn.core.kernels.gluon.record import copy_rows, copy_vectors
from kvarn.core.kernels.unpack import side_by_side

# Of a group.
WARPS = gl.constexpr(4)
# Query columns of a program; tokens that a group takes at a time; channels of a block of shared memory, of a plane of
# latents, of two planes.
COLUMNS = gl.constexpr(64)
TOKENS = gl.constexpr(64)
BLOCK = gl.constexpr(64)
PLANE = gl.constexpr(128)
HALF = gl.constexpr(256)
# Blocks of a row: the last one is the rope part.
BLOCKS = gl.constexpr(9)


@gluon.constexpr_function
def groups_mma(width):
    """Return the layout of a group's MMAs' results, [columns, tokens or channels]."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width, 16])


@gluon.constexpr_function
def operand_shared():
    """Return the layout of an MMA's operand in shared memory: rows of 64 numbers, swizzled."""
    return gl.NVMMASharedLayout(128, 16, rank=2)


@gluon.constexpr_function
def rows_layout(width):
    """Return the layout of rows of numbers on their way to shared memory: 16 bytes of halfs a thread."""
    across = min(16, width // 8)
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


@gluon.jit
def allocate_rows(ROWS: gl.constexpr):
    """Return shared memory for rows: latents in blocks of channels, [8, rows, 64], and rope parts, [rows, 64]."""
    latents = gl.allocate_shared_memory(gl.float16, [BLOCKS - 1, ROWS, BLOCK], operand_shared())
    return latents, gl.allocate_shared_memory(gl.float16, [ROWS, BLOCK], operand_shared())


@gluon.jit
def blocks_together(rows, WIDTH: gl.constexpr):
    """Return the same memory with neighbouring blocks of latents side by side, [parts, rows, WIDTH]."""
    shape: gl.constexpr = (8 * BLOCK // WIDTH, rows[0].shape[1], WIDTH)
    return seen_as(rows[0], gl.float16, shape, operand_shared())


@gluon.jit
def _load_rows(ptr, offsets, ok, WIDTH: gl.constexpr):
    """Load rows of WIDTH numbers, which start at offsets, as fp16; zeros if not ok."""
    layout: gl.constexpr = rows_layout(WIDTH)
    channel = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    at = gl.convert_layout(offsets, gl.SliceLayout(1, layout))
    mask = gl.convert_layout(ok, gl.SliceLayout(1, layout))
    rows = gl.load(ptr + (at[:, None] + channel[None, :]), mask=mask[:, None], other=0.0)
    return rows.to(gl.float32).to(gl.float16)


@gluon.jit
def store_rows(blocks, ptr, offsets, ok):
    """Bring rows, which start at offsets after ptr, to shared memory."""
    for plane in gl.static_range(4):
        blocks_together(blocks, PLANE).index(plane).store(_load_rows(ptr + plane * PLANE, offsets, ok, PLANE))
    blocks[1].store(_load_rows(ptr + 4 * PLANE, offsets, ok, BLOCK))


@gluon.jit
def load_queries(q, q_ptr, q_row, ok, WHICH: gl.constexpr):
    """Bring a group's half of the channels of a task's queries, already rotated, to shared memory.

    q_row, ok: [columns].
    """
    planes = blocks_together(q, PLANE)
    base = q_ptr + WHICH * HALF
    for plane in gl.static_range(2):
        rows = _load_rows(base + plane * PLANE, q_row * (BLOCKS * BLOCK), ok, PLANE)
        planes.index(2 * WHICH + plane).store(rows)
    if WHICH == 0:
        q[1].store(_load_rows(q_ptr + 2 * HALF, q_row * (BLOCKS * BLOCK), ok, BLOCK))


@gluon.jit
def load_words(record, wanted, FIELDS: gl.constexpr, WHICH: gl.constexpr):
    """Load the packed words of a group's tokens of a record, [tokens, 128], into registers."""
    layout: gl.constexpr = rows_layout(PLANE)
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, layout))
    word = gl.arange(0, PLANE, layout=gl.SliceLayout(0, layout))
    ptr = record.to(gl.pointer_type(gl.int16)) + (FIELDS[0][2] // 2 + WHICH * TOKENS * PLANE)
    return gl.load(ptr + (token * PLANE)[:, None] + word[None, :], mask=wanted, other=0)


@gluon.jit
def _prefetch_lines(ptr, COUNT: gl.constexpr):
    """Begin to bring so many lines of 128 bytes to the L2 cache. ptr: of halfs."""
    line = gl.arange(0, COUNT, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptr + line * 64], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def prefetch_record(
    record, FIELDS: gl.constexpr, ROPE_START: gl.constexpr, ROPE_FIELDS: gl.constexpr, WHICH: gl.constexpr
):
    """Begin to bring a group's tokens of a record to the L2 cache, words and rope parts.

    They are read once there is room for them; loads begun before would have to end before the next fence.
    """
    ROPE_LINES: gl.constexpr = TOKENS if len(ROPE_FIELDS) == 0 else TOKENS // 2
    halfs = record.to(gl.pointer_type(gl.float16))
    _prefetch_lines(halfs + (FIELDS[0][2] // 2 + WHICH * TOKENS * PLANE), TOKENS * PLANE // 64)
    _prefetch_lines(halfs + (ROPE_START // 2 + WHICH * ROPE_LINES * BLOCK), ROPE_LINES)


@gluon.jit
def load_rope_words(record, wanted, START: gl.constexpr, FIELDS: gl.constexpr, WHICH: gl.constexpr):
    """Load the packed words of the rope parts of a group's tokens, [tokens, 32], if they have codes."""
    WORDS: gl.constexpr = FIELDS[0][3] if len(FIELDS) > 0 else 8
    layout: gl.constexpr = rows_layout(WORDS)
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, layout))
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, layout))
    packed = gl.zeros((TOKENS, WORDS), gl.int16, layout)
    if len(FIELDS) > 0:
        ptr = record.to(gl.pointer_type(gl.int16)) + (START // 2 + WHICH * TOKENS * WORDS)
        packed = gl.load(ptr + (token * WORDS)[:, None] + word[None, :], mask=wanted, other=0)
    return packed


@gluon.jit
def copy_rope(k, record, wanted, START: gl.constexpr, FIELDS: gl.constexpr, WHICH: gl.constexpr):
    """Begin to copy the rope parts of a group's tokens of a record, if they have no codes."""
    if len(FIELDS) == 0:  # noqa: SIM102 (a constant and a condition of the kernel)
        if wanted:
            ptr = record.to(gl.pointer_type(gl.float16)) + (START // 2 + WHICH * TOKENS * BLOCK)
            copy_rows(k[1], ptr, BLOCK, WARPS)
    async_copy.commit_group()


@gluon.jit
def copy_scales(
    vectors, rope_vectors, record, wanted, SCALES: gl.constexpr, ROPE_FIELDS: gl.constexpr,
    ROPE_SCALES: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Begin to copy the scales and offsets of a record, which each group has for itself."""
    if wanted:
        copy_vectors(vectors, WHICH, record, SCALES, WARPS)
        if len(ROPE_FIELDS) > 0:
            copy_vectors(rope_vectors, WHICH, record, ROPE_SCALES, WARPS)
    async_copy.commit_group()


@gluon.jit
def restored_plane(words, vectors, BITS: gl.constexpr, INDEX: gl.constexpr):
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
def restore_rope(k, words, rope_vectors, FIELDS: gl.constexpr):
    """Restore the rope part of a record, if it has codes, to where it is copied if not."""
    if len(FIELDS) > 0:
        first = restored_plane(words, rope_vectors, 8, 0)
        k[1].store(side_by_side(first, restored_plane(words, rope_vectors, 8, 1)))


@gluon.jit
def allocate_vectors(LENGTH: gl.constexpr):
    """Return shared memory for scales and for offsets of LENGTH channels, of each group."""
    scales = gl.allocate_shared_memory(gl.float16, [2, LENGTH], plain_shared(1))
    return scales, gl.allocate_shared_memory(gl.float16, [2, LENGTH], plain_shared(1))


@gluon.jit
def begin_records(
    k, vectors, rope_vectors, records_ptr, table, begin, stop, block_stride, tile_stride, TILES: gl.constexpr,
    FIELDS: gl.constexpr, SCALES: gl.constexpr, ROPE_START: gl.constexpr, ROPE_FIELDS: gl.constexpr,
    ROPE_SCALES: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Begin to read a group's tokens of tile `begin` of a request, if it is before stop. Return packed words."""
    wanted = begin < stop
    page = gl.load(table + begin, mask=wanted, other=0)
    record = find_record(records_ptr, page, 0, block_stride, tile_stride, 0, TILES)
    copy_scales(vectors, rope_vectors, record, wanted, SCALES, ROPE_FIELDS, ROPE_SCALES, WHICH)
    words = load_words(record, wanted, FIELDS, WHICH)
    rope_words = load_rope_words(record, wanted, ROPE_START, ROPE_FIELDS, WHICH)
    copy_rope(k, record, wanted, ROPE_START, ROPE_FIELDS, WHICH)
    return words, rope_words
