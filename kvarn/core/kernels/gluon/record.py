"""One record: from global to shared memory, and from there through the MMAs of keys and of values.

What a tile owes to a query column whatever the token, for offsets, comes from MMAs whose left operand has equal rows,
so that it arrives where the sums stand.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kvarn.core.kernels.gluon.codes import CODE_UNIT, joined_codes, lane_weights
from kvarn.core.kernels.gluon.layouts import (
    begin_copy,
    mma_layout,
    operand_width,
    plain_shared,
    repeat_layout,
    rows_copy_layout,
    vector_copy_layout,
    words_layout,
)
from kvarn.core.kernels.unpack import one_below_other


@gluon.jit
def allocate_half(
    FIELDS: gl.constexpr, ROWS: gl.constexpr, LENGTH: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Return shared memory for the keys or the values of STAGES records: words of every field, scales and offsets."""
    words = ()
    for f in gl.static_range(len(FIELDS)):
        words = words + (gl.allocate_shared_memory(gl.int16, [STAGES, ROWS, FIELDS[f][3]], plain_shared(2)),)
    scales = gl.allocate_shared_memory(gl.float16, [STAGES, LENGTH], plain_shared(1))
    offsets = gl.allocate_shared_memory(gl.float16, [STAGES, LENGTH], plain_shared(1))
    return words, (scales, offsets)


@gluon.jit
def copy_half(
    words, vectors, record, slot, FIELDS: gl.constexpr, OFFSETS: gl.constexpr, warps: gl.constexpr
):  # fmt: skip
    """Begin to copy the keys or the values of a record into a slot. OFFSETS: bytes of scales and of offsets."""
    for f in gl.static_range(len(FIELDS)):
        ptr = record.to(gl.pointer_type(gl.int16)) + FIELDS[f][2] // 2
        copy_rows(words[f].index(slot), ptr, FIELDS[f][3], warps)
    copy_vectors(vectors, slot, record, OFFSETS, warps)


@gluon.jit
def copy_next_half(
    words, vectors, record, slot, wanted, FIELDS: gl.constexpr, OFFSETS: gl.constexpr, warps: gl.constexpr
):  # fmt: skip
    """Begin to copy the keys or the values of a record into a slot, as one group; none if not wanted."""
    if wanted:
        copy_half(words, vectors, record, slot, FIELDS, OFFSETS, warps)
    async_copy.commit_group()


@gluon.jit
def copy_rows(buffer, ptr, row_stride: gl.constexpr, warps: gl.constexpr):
    """Begin to copy rows that stand row_stride elements apart."""
    R: gl.constexpr = buffer.shape[0]
    W: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = rows_copy_layout(2 * W, warps)
    row = gl.arange(0, R, layout=gl.SliceLayout(1, layout))
    at = gl.arange(0, W, layout=gl.SliceLayout(0, layout))
    begin_copy(buffer, ptr + (row * row_stride)[:, None] + at[None, :])


@gluon.jit
def copy_vectors(vectors, slot, record, OFFSETS: gl.constexpr, warps: gl.constexpr):
    """Begin to copy scales and offsets into a slot. OFFSETS: the bytes of a record where they stand."""
    halfs = record.to(gl.pointer_type(gl.float16))
    for i in gl.static_range(2):
        buffer = vectors[i].index(slot)
        at = gl.arange(0, buffer.shape[0], layout=vector_copy_layout(buffer.shape[0], warps))
        begin_copy(buffer, halfs + OFFSETS[i] // 2 + at)


@gluon.jit
def halves(x, layout: gl.constexpr):
    """Return a row of x, [16, columns], whose rows 0-7 are alike, and one of rows 8-15: [8, columns] each."""
    C: gl.constexpr = x.shape[1]
    first, second = gl.split(gl.permute(gl.reshape(x, (2, 8, C)), (1, 2, 0)))
    target: gl.constexpr = gl.SliceLayout(0, layout)
    first = gl.convert_layout(first, target, assert_trivial=True)
    return first, gl.convert_layout(second, target, assert_trivial=True)


@gluon.jit
def repeat(x, ROWS: gl.constexpr, layout: gl.constexpr, mma: gl.constexpr):
    """Repeat x, [8, columns] with equal rows, down to [ROWS, columns], as an MMA's result."""
    C: gl.constexpr = x.shape[1]
    many, _ = gl.broadcast(gl.expand_dims(x, 0), gl.zeros((ROWS // 8, 8, C), gl.float32, layout))
    return gl.convert_layout(gl.reshape(many, (ROWS, C)), mma, assert_trivial=True)


@gluon.jit
def key_logits(
    words, vectors, slot, q_parts, FIELDS: gl.constexpr, G: gl.constexpr, GROUP_TOKENS: gl.constexpr,
    warps: gl.constexpr,
):  # fmt: skip
    """Return q . k of the tokens of the record in a slot, [G, columns], as an MMA's result.

    q_parts: [2, D, columns], fp16 in shared memory: q rounded, and what that leaves, which only the offsets are worth.
    """
    D: gl.constexpr = q_parts.shape[1]
    C: gl.constexpr = q_parts.shape[2]
    GROUPS: gl.constexpr = G // GROUP_TOKENS
    mma: gl.constexpr = mma_layout(warps)
    width: gl.constexpr = operand_width(FIELDS)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, width)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, width)
    repeated: gl.constexpr = repeat_layout(GROUP_TOKENS, C, warps)
    q = q_parts.index(0).load(right)
    # rows 0-7 for the first group, rows 8-15 for the second
    upper = (gl.arange(0, 16, layout=gl.SliceLayout(1, left)) < 8)[:, None]
    first = vectors[1].index(slot).slice(0, D).load(gl.SliceLayout(0, left))
    second = vectors[1].index(slot).slice((GROUPS - 1) * D, D).load(gl.SliceLayout(0, left))
    offset = gl.where(upper, first[None, :], second[None, :])
    bias = mma_v2(offset, q, gl.zeros((16, C), gl.float32, mma))
    bias = mma_v2(offset, q_parts.index(1).load(right), bias)
    logits = ()
    for group in gl.static_range(GROUPS):
        scale = vectors[0].index(slot).slice(group * D, D).load(gl.SliceLayout(1, right))
        x = gl.zeros((GROUP_TOKENS, C), gl.float32, mma)
        for f in gl.static_range(len(FIELDS)):
            weights = lane_weights(D, FIELDS[f][0], FIELDS[f][1], gl.SliceLayout(1, right))
            scaled = q * weights[:, None] * scale[:, None]
            rows = words[f].index(slot).slice(group * GROUP_TOKENS, GROUP_TOKENS)
            packed = rows.load(words_layout(GROUP_TOKENS, FIELDS[f][3], width, warps))
            x = mma_v2(joined_codes(packed, FIELDS[f][0], left), scaled, x)
        logits = logits + (x,)
    first, second = halves(bias, repeated)
    x = logits[0] * CODE_UNIT + repeat(first, GROUP_TOKENS, repeated, mma)
    if GROUPS > 1:
        after = logits[1] * CODE_UNIT + repeat(second, GROUP_TOKENS, repeated, mma)
        x = gl.convert_layout(one_below_other(x, after), mma, assert_trivial=True)
    return x


@gluon.jit
def weigh_values(
    p, words, vectors, slot, D: gl.constexpr, FIELDS: gl.constexpr, warps: gl.constexpr
):  # fmt: skip
    """Return the sum of weight * v over the tokens of the record in a slot, [D, columns], and that of the weights.

    p: weights, [G, columns], fp16, as an MMA's right operand. Their sum comes in equal rows, [8, columns].
    """
    G: gl.constexpr = p.shape[0]
    C: gl.constexpr = p.shape[1]
    mma: gl.constexpr = mma_layout(warps)
    width: gl.constexpr = operand_width(FIELDS)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, width)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, width)
    repeated: gl.constexpr = repeat_layout(D, C, warps)
    scale = vectors[0].index(slot).load(gl.SliceLayout(1, right))
    offset = vectors[1].index(slot).load(gl.SliceLayout(0, left))
    upper = (gl.arange(0, 16, layout=gl.SliceLayout(1, left)) < 8)[:, None]
    ones = gl.full((16, G), 1.0, gl.float16, left)
    # rows 0-7: offsets; rows 8-15: the weights alone
    sums = mma_v2(gl.where(upper, offset[None, :], ones), p, gl.zeros((16, C), gl.float32, mma))
    o = gl.zeros((D, C), gl.float32, mma)
    for f in gl.static_range(len(FIELDS)):
        weights = lane_weights(G, FIELDS[f][0], FIELDS[f][1], gl.SliceLayout(1, right))
        scaled = p * weights[:, None] * scale[:, None]
        packed = words[f].index(slot).load(words_layout(D, FIELDS[f][3], width, warps))
        o = mma_v2(joined_codes(packed, FIELDS[f][0], left), scaled, o)
    bias, mass = halves(sums, repeated)
    return o * CODE_UNIT + repeat(bias, D, repeated, mma), mass
