"""How tensors lie in registers and in shared memory, so that an MMA's operands need no move on their way.

An MMA multiplies [16, 16] by [16, 8]; its left operand's rows are tokens (keys) or channels (values), its columns are
query columns. Warps stand side by side along the rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Begins an asynchronous copy from global to shared memory; Triton 3.9 gave it the first name.
begin_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
# Lets the warps of a program, or of a group that is specialised, wait for one another: the second in Triton 3.6.
wait_for_warps = getattr(gl, "barrier", None) or gl.thread_barrier
# Sees shared memory as of another type, shape and layout, but of the same size: the second before Triton 3.9.
_Shared = gl.shared_memory_descriptor
seen_as = getattr(_Shared, "reinterpret", None) or _Shared._reinterpret


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
def query_load_layout(channels, width, warps):
    """Return the layout in which queries are loaded, [channels, columns]: so many neighbouring channels a thread."""
    across = min(32, channels // width)
    return gl.BlockedLayout([width, 1], [across, 32 // across], [1, warps], [0, 1])


@gluon.constexpr_function
def query_shared(fields):
    """Return the layout of queries in shared memory, [channels, columns]: channels inside, as a right operand is read.

    A thread reads as many neighbouring channels as fill an operand; columns two apart share banks, hence the swizzle.
    """
    return gl.SwizzledSharedLayout(4 * operand_width(fields), 1, 2, [0, 1])


@gluon.constexpr_function
def raw_key_shared():
    """Return the layout of raw keys in shared memory, [rows, channels], read 16 bytes a thread."""
    return gl.SwizzledSharedLayout(32, 1, 2, [1, 0])


@gluon.constexpr_function
def raw_value_shared():
    """Return the layout of raw values in shared memory, [rows, channels], read transposed by ldmatrix."""
    return gl.SwizzledSharedLayout(8, 1, 8, [1, 0])


@gluon.constexpr_function
def wide_mma():
    """Return the layout of an MMA's result, [warps, queries, tokens or channels]: each warp has its own."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[2, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def wide_key_words_layout(rows, words, width):
    """Return the layout of keys' words, [tokens, words], which turns into a right operand's."""
    reg = [[0, 1 << i] for i in range(width.bit_length() - 1)]
    reg += [[0, 1 << i] for i in range((4 * width).bit_length() - 1, words.bit_length() - 1)]
    reg += [[1 << i, 0] for i in range(4, rows.bit_length() - 1)]
    lane = [[0, width], [0, 2 * width], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(reg, lane, [[8, 0]], [], [rows, words])


@gluon.constexpr_function
def wide_value_words_layout(rows, words):
    """Return the layout of values' words, [channels, words], which turns into a right operand's."""
    reg = [[0, 1]] + [[0, 1 << i] for i in range(4, words.bit_length() - 1)]
    reg += [[1 << i, 0] for i in range(3, rows.bit_length() - 1)]
    lane = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(reg, lane, [[0, 8]], [], [rows, words])


@gluon.constexpr_function
def wide_vector_layout(tokens):
    """Return the layout of a vector of a tile's tokens as warps' operands hold them: blocks of 8 by turns."""
    reg = [[1]] + [[1 << i] for i in range(4, tokens.bit_length() - 1)]
    lane = [[2], [4], [0], [0], [0]]
    return gl.DistributedLinearLayout(reg, lane, [[8]], [], [tokens])


@gluon.constexpr_function
def shared_logits_mma(groups, warps):
    """Return the layout of an MMA's result, [groups, queries, tokens]: warps share the tokens of every group."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[groups, 1, warps // groups], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def shared_vector_layout(groups, lanes, words, warps):
    """Return the layout of vectors of a step's lanes, [groups, lanes], as threads have them that hold words."""
    reg = [[0, 1 << i] for i in range(words.bit_length() - 3)]
    reg += [[0, words << i] for i in range((lanes // words).bit_length() - 1)]
    lane = [[0, words // 4], [0, words // 2], [0, 0], [0, 0], [0, 0]]
    warp = [[0, 0] for _ in range((warps // groups).bit_length() - 1)]
    warp += [[1 << i, 0] for i in range(groups.bit_length() - 1)]
    return gl.DistributedLinearLayout(reg, lane, warp, [], [groups, lanes])


@gluon.constexpr_function
def shared_operand_shared(lanes):
    """Return the layout of a left operand in shared memory, [queries, lanes], read by ldmatrix."""
    return gl.SwizzledSharedLayout(8, max(1, 64 // lanes), min(8, lanes // 8), [1, 0])


@gluon.constexpr_function
def shared_output_mma(warps):
    """Return the layout of an MMA's result, [queries, channels]: warps side by side along the channels."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, warps], instr_shape=[16, 8])


@gluon.constexpr_function
def shared_key_words_layout(tokens, words, groups, warps):
    """Return the layout of keys' words, [tokens, words], which turns into a right operand's when transposed."""
    each = warps // groups
    reg = [[0, 1 << i] for i in range(words.bit_length() - 3)]
    reg += [[1 << i, 0] for i in range((8 * each).bit_length() - 1, (tokens // groups).bit_length() - 1)]
    lane = [[0, words // 4], [0, words // 2], [1, 0], [2, 0], [4, 0]]
    warp = [[8 << i, 0] for i in range(each.bit_length() - 1)]
    warp += [[tokens // groups << i, 0] for i in range(groups.bit_length() - 1)]
    return gl.DistributedLinearLayout(reg, lane, warp, [], [tokens, words])


@gluon.constexpr_function
def shared_value_words_layout(rows, words, warps):
    """Return the layout of values' words, [channels, words], which turns into a right operand's when transposed."""
    reg = [[0, 1]] + [[0, 1 << i] for i in range(3, words.bit_length() - 1)]
    reg += [[1 << i, 0] for i in range((8 * warps).bit_length() - 1, rows.bit_length() - 1)]
    lane = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    warp = [[8 << i, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(reg, lane, warp, [], [rows, words])
