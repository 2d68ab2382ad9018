"""Attention over records for 16 query columns of one row: queries are an MMA's rows, each warp has tokens of its own.

A warp holds every second block of 8 tokens of a tile, which in values are every second block of 8 words. So logits lie
where the product with values needs their weights, and warps meet once, after the last tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kvarn.core.kernels.address import find_record
from kvarn.core.kernels.gluon.codes import CODE_UNIT, joined_codes, lane_weights
from kvarn.core.kernels.gluon.layouts import (
    operand_width,
    wide_key_words_layout,
    wide_mma,
    wide_value_words_layout,
    wide_vector_layout,
)
from kvarn.core.kernels.gluon.record import copy_next_half
from kvarn.core.kernels.task import NEVER, WEIGHT_SHIFT, cap
from kvarn.core.kernels.unpack import one_behind_other

WARPS = gl.constexpr(2)


@gluon.constexpr_function
def serves_wide(columns, rows, head_dim, tokens, group_tokens, value_fields, warps):
    """Return whether `attend_records_wide` serves a launch: a warp's part of values' words is whole blocks of 8."""
    whole = all(words >= 16 for _, _, _, words in value_fields)
    return columns == 16 and rows == 1 and head_dim <= 128 and tokens == 2 * group_tokens and warps == 2 and whole


@gluon.jit
def _even_and_odd(x):
    """Return what stands in even and in odd columns of x, [warps, 16, 8], each the same in all of them: [warps, 16]."""
    even, odd = gl.split(gl.reshape(x, (x.shape[0], 16, 4, 2)))
    rows: gl.constexpr = gl.SliceLayout(2, wide_mma())
    even, odd = gl.max(even, axis=2), gl.max(odd, axis=2)
    return gl.convert_layout(even, rows, assert_trivial=True), gl.convert_layout(odd, rows, assert_trivial=True)


@gluon.jit
def _parities(ROWS: gl.constexpr, layout: gl.constexpr):
    """Return right operands, [warps, ROWS, 8], that are one in even columns, and in odd ones, and zero in others."""
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    odd = (column % 2).to(gl.float16)[None, None, :] * gl.full((WARPS, ROWS, 8), 1.0, gl.float16, layout)
    return 1.0 - odd, odd


@gluon.jit
def _key_logits(words, vectors, slot, q_parts, K_FIELDS: gl.constexpr, G: gl.constexpr, GROUP_TOKENS: gl.constexpr):
    """Return q . code of a slot's tokens, for each group [warps, 16, tokens of a warp], and q . offset of both groups.

    Products of both are [warps, 16]: what all tokens of a group owe.
    """
    D: gl.constexpr = q_parts.shape[1]
    GROUPS: gl.constexpr = G // GROUP_TOKENS
    mma: gl.constexpr = wide_mma()
    width: gl.constexpr = operand_width(K_FIELDS)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, width)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, width)
    rows: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, right))
    inner: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, left))
    zeros = gl.zeros((WARPS, 16, 8), gl.float32, mma)
    even, odd = _parities(D, right)
    like = gl.full((WARPS, 16, D), 1.0, gl.float16, left)  # times ones, which the compiler drops: all warps' queries
    q = q_parts.index(0).permute((1, 0)).load(gl.SliceLayout(0, left))[None, :, :] * like
    first = vectors[1].index(slot).slice(0, D).load(rows)[None, :, None]
    second = vectors[1].index(slot).slice((GROUPS - 1) * D, D).load(rows)[None, :, None]
    offset = first * even + second * odd
    owed = mma_v2(q, offset, zeros)
    low = q_parts.index(1).permute((1, 0)).load(gl.SliceLayout(0, left))[None, :, :] * like
    owed = mma_v2(low, offset, owed)
    logits = ()
    for group in gl.static_range(GROUPS):
        scale = vectors[0].index(slot).slice(group * D, D).load(inner)
        x = gl.zeros((WARPS, 16, GROUP_TOKENS // WARPS), gl.float32, mma)
        for f in gl.static_range(len(K_FIELDS)):
            weights = lane_weights(D, K_FIELDS[f][0], K_FIELDS[f][1], inner)
            scaled = q * weights[None, None, :] * scale[None, None, :]
            rows_of_group = words[f].index(slot).slice(group * GROUP_TOKENS, GROUP_TOKENS)
            packed = rows_of_group.load(wide_key_words_layout(GROUP_TOKENS, K_FIELDS[f][3], width))
            packed = gl.permute(gl.reshape(packed, (GROUP_TOKENS // 16, 2, 8, K_FIELDS[f][3])), (1, 3, 0, 2))
            packed = gl.reshape(packed, (WARPS, K_FIELDS[f][3], GROUP_TOKENS // 2))
            x = mma_v2(scaled, joined_codes(packed, K_FIELDS[f][0], right), x)
        logits = logits + (x * CODE_UNIT,)
    return logits, _even_and_odd(owed)


@gluon.jit
def _weigh_values(p, words, vectors, slot, FIRST: gl.constexpr, ROWS: gl.constexpr, V_FIELDS: gl.constexpr):
    """Return the sum of weight * v over a slot's tokens for ROWS channels, [warps, 16, ROWS], and what is owed to it.

    p: weights, [warps, 16, tokens of a warp], fp16, as a left operand. What is owed, [warps, 16, 8], stands in even
    columns, the sum of the weights in odd ones.
    """
    T: gl.constexpr = p.shape[2]
    mma: gl.constexpr = wide_mma()
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    zeros = gl.zeros((WARPS, 16, 8), gl.float32, mma)
    even, odd = _parities(T, right)
    # tokens of a warp, as they stand in a vector: [blocks of 16, warps, 8]
    owed = mma_v2(p, _tokens(vectors[1].index(slot), gl.SliceLayout(2, right))[:, :, None] * even + odd, zeros)
    o = gl.zeros((WARPS, 16, ROWS), gl.float32, mma)
    for f in gl.static_range(len(V_FIELDS)):
        weights = lane_weights(T, V_FIELDS[f][0], V_FIELDS[f][1], gl.SliceLayout(0, gl.SliceLayout(1, left)))
        scaled = p * weights[None, None, :] * _tokens(vectors[0].index(slot), gl.SliceLayout(1, left))[:, None, :]
        packed = words[f].index(slot).slice(FIRST, ROWS).load(wide_value_words_layout(ROWS, V_FIELDS[f][3]))
        packed = gl.permute(gl.reshape(packed, (ROWS, V_FIELDS[f][3] // 16, 2, 8)), (2, 1, 3, 0))
        packed = gl.reshape(packed, (WARPS, V_FIELDS[f][3] // 2, ROWS))
        o = mma_v2(scaled, joined_codes(packed, V_FIELDS[f][0], right), o)
    return o * CODE_UNIT, owed


@gluon.jit
def _tokens(vector, layout: gl.constexpr):
    """Return a vector of a tile's tokens, [warps, tokens of a warp], as an operand has them inside."""
    G: gl.constexpr = vector.shape[0]
    x = vector.load(wide_vector_layout(G))
    x = gl.reshape(gl.permute(gl.reshape(x, (G // 16, 2, 8)), (1, 0, 2)), (WARPS, G // 2))
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _masked(x, tile, sinks, G: gl.constexpr):
    """Hide sinks, which are read elsewhere, from logits of both groups."""
    mma: gl.constexpr = wide_mma()
    at = gl.arange(0, G // 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma)))
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, mma)))
    token = tile * G + (at // 8 * 16 + at % 8)[None, None, :] + 8 * warp[:, None, None]
    first, second = x
    if tile * G < sinks:
        first = gl.where(token >= sinks, first, float("-inf"))
        second = gl.where(G // 2 + token >= sinks, second, float("-inf"))
    return first, second


@gluon.jit
def _together(m, mass, acc0, acc1):
    """Merge what the warps have: running maxima, sums in equal columns, and both halves of the channels."""
    largest = gl.max(m, axis=0)
    decay = gl.exp2(m - largest[None, :])
    total = gl.sum(gl.max(mass, axis=2) * decay, axis=0)
    both = one_behind_other(acc0 * decay[:, :, None], acc1 * decay[:, :, None], 2)
    return largest, total, gl.permute(gl.sum(both, axis=0), (1, 0))


@gluon.jit
def attend_records_wide(
    k_words, k_vectors, v_words, v_vectors, records_ptr, table, begin, stop, sinks, head, q_parts,
    q_scale, block_stride, tile_stride, head_stride,
    D: gl.constexpr, G: gl.constexpr, TILES: gl.constexpr, K_FIELDS: gl.constexpr, V_FIELDS: gl.constexpr,
    OFFSETS: gl.constexpr, GROUP_TOKENS: gl.constexpr, SOFTCAP: gl.constexpr,
    STAGES: gl.constexpr, warps: gl.constexpr,
):  # fmt: skip
    """Attend tiles begin to stop of a request from their records, as `attend._attend_records` does.

    Returns running maximum [16], sum [16] and output [D, 16] of all warps.
    """
    mma: gl.constexpr = wide_mma()
    K_OFFSETS: gl.constexpr = (OFFSETS[0], OFFSETS[1])
    V_OFFSETS: gl.constexpr = (OFFSETS[2], OFFSETS[3])
    H: gl.constexpr = D // 2
    m = gl.full((WARPS, 16), NEVER, gl.float32, gl.SliceLayout(2, mma))
    mass = gl.zeros((WARPS, 16, 8), gl.float32, mma)
    acc0 = gl.zeros((WARPS, 16, H), gl.float32, mma)
    acc1 = gl.zeros((WARPS, 16, H), gl.float32, mma)
    slot = 0
    page = gl.load(table + gl.maximum(gl.minimum(begin + STAGES, stop - 1), 0))
    for tile in range(begin, stop):
        record = find_record(records_ptr, page, head, block_stride, tile_stride, head_stride, TILES)
        page = gl.load(table + gl.minimum(tile + STAGES + 1, stop - 1))
        async_copy.wait_group(2 * STAGES - 1)
        logits, owed = _key_logits(k_words, k_vectors, slot, q_parts, K_FIELDS, G, GROUP_TOKENS)
        copy_next_half(k_words, k_vectors, record, slot, tile + STAGES < stop, K_FIELDS, K_OFFSETS, warps)
        x, factor = logits, q_scale
        if SOFTCAP > 0:
            x = (
                cap((x[0] + owed[0][:, :, None]) * q_scale, SOFTCAP),
                cap((x[1] + owed[1][:, :, None]) * q_scale, SOFTCAP),
            )
            owed, factor = (0.0 * owed[0], 0.0 * owed[1]), 1.0
        x = _masked(x, tile, sinks, G)
        largest = gl.maximum(gl.max(x[0], axis=2) + owed[0], gl.max(x[1], axis=2) + owed[1])
        m_new = gl.maximum(m, largest * factor)
        decay = gl.exp2(m - m_new)
        p0 = gl.exp2(x[0] * factor + (owed[0] * factor - (m_new - WEIGHT_SHIFT))[:, :, None]).to(gl.float16)
        p1 = gl.exp2(x[1] * factor + (owed[1] * factor - (m_new - WEIGHT_SHIFT))[:, :, None]).to(gl.float16)
        p = gl.convert_layout(one_behind_other(p0, p1, 2), gl.DotOperandLayout(0, mma, 2), assert_trivial=True)
        async_copy.wait_group(2 * STAGES - 1)
        o, owed_values = _weigh_values(p, v_words, v_vectors, slot, 0, H, V_FIELDS)
        bias, added = _even_and_odd(owed_values)
        acc0 = acc0 * decay[:, :, None] + (o + bias[:, :, None])
        o, _ = _weigh_values(p, v_words, v_vectors, slot, H, H, V_FIELDS)
        acc1 = acc1 * decay[:, :, None] + (o + bias[:, :, None])
        copy_next_half(v_words, v_vectors, record, slot, tile + STAGES < stop, V_FIELDS, V_OFFSETS, warps)
        mass = mass * decay[:, :, None] + added[:, :, None]
        m = m_new
        slot = (slot + 1) % STAGES
    return _together(m, mass, acc0, acc1)
