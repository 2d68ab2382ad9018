"""Attention over records for 16 or 32 query columns of several rows: warps share a tile, queries are an MMA's rows.

For logits warps have tokens of their own, for the output channels of their own: every word is unpacked once, and the
output is held once. Weights change hands in between, in shared memory, where warps also find their common maximum.
Planes of words are unpacked one after the other, each for MMAs of its own: no more of a tile is in registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kvarn.core.kernels.address import find_record
from kvarn.core.kernels.gluon.codes import CODE_UNIT, codes_of_plane, weights_of
from kvarn.core.kernels.gluon.layouts import (
    plain_shared,
    rows_copy_layout,
    seen_as,
    shared_key_words_layout,
    shared_logits_mma,
    shared_operand_shared,
    shared_output_mma,
    shared_value_words_layout,
    shared_vector_layout,
)
from kvarn.core.kernels.gluon.record import copy_next_half
from kvarn.core.kernels.task import NEVER, WEIGHT_SHIFT, cap
from kvarn.core.kernels.unpack import planes, side_by_side

# Tokens of a group, which have keys' scales of their own.
_GROUP = gl.constexpr(64)
# Queries are stored smaller by this, and scales are as much larger: small ones keep their bits times a lane's weight.
_DOWN = gl.constexpr(2.0**-4)


@gluon.constexpr_function
def serves_shared(columns, warps):
    """Return whether `attend_records_shared` serves a launch: columns fill an MMA's rows."""
    return columns >= 16 and warps == 4


@gluon.constexpr_function
def _planes_each(words):
    """Return how many planes of so many words fill the inner side of an MMA."""
    return max(1, 16 // words)


@gluon.jit
def _codes(packed, BITS: gl.constexpr, STEP: gl.constexpr):
    """Return the codes of a step's planes, [rows, words] to [rows, lanes]: two planes if words are few."""
    EACH: gl.constexpr = _planes_each(packed.shape[1])
    codes = codes_of_plane(packed, BITS, STEP * EACH)
    if EACH > 1:
        codes = side_by_side(codes, codes_of_plane(packed, BITS, STEP * EACH + 1))
    return codes


@gluon.jit
def _in_operand_order(x, WORDS: gl.constexpr):
    """Return the lanes of some planes, [a, lanes, b], in the order in which an MMA takes them.

    Threads have a quarter of a row's words; an MMA wants pairs of neighbours from four threads by turns.
    """
    A: gl.constexpr = x.shape[0]
    LANES: gl.constexpr = x.shape[1]
    B: gl.constexpr = x.shape[2]
    parts = gl.reshape(x, (A, LANES // WORDS, 4, WORDS // 8, 2, B))
    return gl.reshape(gl.permute(parts, (0, 1, 3, 2, 4, 5)), (A, LANES, B))


@gluon.jit
def _store_queries(q_parts, PARTS: gl.constexpr, WORDS: gl.constexpr, warps: gl.constexpr):
    """Return queries in shared memory, times _DOWN, [parts, steps * columns, lanes of a step], in an MMA's order."""
    D: gl.constexpr = q_parts.shape[1]
    C: gl.constexpr = q_parts.shape[2]
    LANES: gl.constexpr = WORDS * _planes_each(WORDS)
    STEPS: gl.constexpr = D // LANES
    shared = gl.allocate_shared_memory(gl.float16, [PARTS, STEPS * C, LANES], shared_operand_shared(LANES))
    for part in gl.static_range(PARTS):
        x = gl.permute(q_parts.index(part).permute((1, 0)).load(rows_copy_layout(2 * D, warps)), (1, 0))
        x = gl.reshape(_in_operand_order(gl.reshape(x, (1, D, C)), WORDS), (STEPS, LANES, C))
        shared.index(part).store(gl.reshape(gl.permute(x, (0, 2, 1)), (STEPS * C, LANES)) * _DOWN)
    return shared


@gluon.jit
def _by_group(vector, GROUPS: gl.constexpr):
    """Return a vector in shared memory as [groups, length of a group]."""
    return seen_as(vector, gl.float16, (GROUPS, vector.shape[0] // GROUPS), plain_shared(2))


@gluon.jit
def _vector(
    vector, GROUPS: gl.constexpr, FIRST: gl.constexpr, LANES: gl.constexpr, WORDS: gl.constexpr, warps: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Return a step's part of a vector of every group's channels, [groups, lanes], in an MMA's order."""
    x = _by_group(vector, GROUPS).slice(FIRST, LANES, 1).load(shared_vector_layout(GROUPS, LANES, WORDS, warps))
    x = _in_operand_order(gl.reshape(x, (GROUPS, LANES, 1)), WORDS)
    return gl.convert_layout(gl.reshape(x, (GROUPS, LANES)), layout)


@gluon.jit
def _add_logits(
    x, owed, words, vectors, slot, queries, K_FIELDS: gl.constexpr, F: gl.constexpr, GROUPS: gl.constexpr,
    C: gl.constexpr, warps: gl.constexpr,
):  # fmt: skip
    """Add q . code of field F of a slot's keys to logits, and, with the first one, q . offset to what is owed."""
    BITS: gl.constexpr = K_FIELDS[F][0]
    W: gl.constexpr = K_FIELDS[F][3]
    LANES: gl.constexpr = W * _planes_each(W)
    mma: gl.constexpr = shared_logits_mma(GROUPS, warps)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    packed = words.index(slot).load(shared_key_words_layout(GROUPS * _GROUP, W, GROUPS, warps))
    # times ones, which the compiler drops: all warps' queries, and the same in all columns
    like = gl.full((GROUPS, C, LANES), 1.0, gl.float16, left)
    columns = gl.full((GROUPS, LANES, 8 * warps // GROUPS), 1.0, gl.float16, right)
    for step in gl.static_range(planes(BITS) * W // LANES):
        q = queries.index(0).slice(step * C, C).load(gl.SliceLayout(0, left))[None, :, :] * like
        if F == 0:
            low = queries.index(1).slice(step * C, C).load(gl.SliceLayout(0, left))[None, :, :] * like
            offset = _vector(
                vectors[1].index(slot), GROUPS, step * LANES, LANES, W, warps, gl.SliceLayout(2, right)
            )  # fmt: skip
            offset = offset[:, :, None] * columns
            # four sums by turns: a chain of MMAs takes its latency for each
            first, second, third, fourth = owed
            owed = (third, fourth, mma_v2(q, offset, first), mma_v2(low, offset, second))
        lane = step * LANES + gl.arange(0, LANES, layout=gl.SliceLayout(0, gl.SliceLayout(1, left)))
        weights = (weights_of(lane, planes(BITS) * W, BITS, K_FIELDS[F][1]) / _DOWN).to(gl.float16)
        scale = _vector(vectors[0].index(slot), GROUPS, step * LANES, LANES, W, warps, gl.SliceLayout(1, left))
        codes = gl.reshape(_codes(packed, BITS, step), (GROUPS, _GROUP, LANES))
        codes = _in_operand_order(gl.permute(codes, (0, 2, 1)), W)
        codes = gl.convert_layout(codes, right, assert_trivial=True)
        x = mma_v2(q * (scale * weights[None, :])[:, None, :], codes, x)
    return x, owed


@gluon.jit
def _key_logits(
    words, vectors, slot, queries, K_FIELDS: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, warps: gl.constexpr
):  # fmt: skip
    """Return q . code of a slot's tokens in CODE_UNITs, [groups, queries, tokens], and what tokens owe for offsets.

    What they owe, [groups, queries, 8 for each warp], times _DOWN, is the same in all columns.
    """
    mma: gl.constexpr = shared_logits_mma(GROUPS, warps)
    x = gl.zeros((GROUPS, C, _GROUP), gl.float32, mma)
    nothing = gl.zeros((GROUPS, C, 8 * warps // GROUPS), gl.float32, mma)
    owed = (nothing, nothing, nothing, nothing)
    for f in gl.static_range(len(K_FIELDS)):
        x, owed = _add_logits(x, owed, words[f], vectors, slot, queries[f], K_FIELDS, f, GROUPS, C, warps)
    return x, (owed[0] + owed[1]) + (owed[2] + owed[3])


@gluon.jit
def _add_values(acc, shared, words, slot, G: gl.constexpr, V_FIELDS: gl.constexpr, warps: gl.constexpr):
    """Add weight * code of a slot's tokens to the output, [queries, channels], in CODE_UNITs.

    shared: weights times scales, and the first field's lane weights, [steps * queries, lanes of a step], fp16.
    """
    C: gl.constexpr = acc.shape[0]
    D: gl.constexpr = acc.shape[1]
    LANES: gl.constexpr = shared.shape[1]
    left: gl.constexpr = gl.DotOperandLayout(0, shared_output_mma(warps), 2)
    right: gl.constexpr = gl.DotOperandLayout(1, shared_output_mma(warps), 2)
    for f in gl.static_range(len(V_FIELDS)):
        packed = words[f].index(slot).load(shared_value_words_layout(D, V_FIELDS[f][3], warps))
        for step in gl.static_range(G // LANES):
            p = shared.slice(step * C, C).load(left)
            if f > 0:
                lane = step * LANES + gl.arange(0, LANES, layout=gl.SliceLayout(0, left))
                first = weights_of(lane, G, V_FIELDS[0][0], V_FIELDS[0][1])
                own = weights_of(lane, G, V_FIELDS[f][0], V_FIELDS[f][1])
                p = p * (own / first).to(gl.float16)[None, :]
            codes = gl.permute(_codes(packed, V_FIELDS[f][0], step), (1, 0))
            acc = mma_v2(p, gl.convert_layout(codes, right, assert_trivial=True), acc)
    return acc


@gluon.jit
def _of_all(x):
    """Return what all warps' threads have of every query, [queries, threads], given [groups, queries, columns]."""
    return gl.reshape(gl.permute(x, (1, 0, 2)), (x.shape[1], x.shape[0] * x.shape[2]))


@gluon.jit
def _by_thread(x):
    """Sum x, [groups, queries, n, columns], over what a thread has of a query, [groups, queries, threads]."""
    pairs: gl.constexpr = (x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2, 2)
    return gl.sum(gl.sum(gl.reshape(x, pairs), axis=4), axis=2)


@gluon.jit
def attend_records_shared(
    k_words, k_vectors, v_words, v_vectors, records_ptr, table, begin, stop, sinks, record_stop, head, q_parts,
    q_scale, block_stride, tile_stride, head_stride,
    D: gl.constexpr, G: gl.constexpr, TILES: gl.constexpr, K_FIELDS: gl.constexpr, V_FIELDS: gl.constexpr,
    OFFSETS: gl.constexpr, SOFTCAP: gl.constexpr, MASK_COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    warps: gl.constexpr,
):  # fmt: skip
    """Attend tiles begin to stop of a request from their records, as `attend._attend_records` does.

    record_stop: [columns], of any layout. Returns running maximum, sum, [columns], and output, [D, columns].
    """
    C: gl.constexpr = q_parts.shape[2]
    GROUPS: gl.constexpr = G // _GROUP
    EACH: gl.constexpr = 8 * warps // GROUPS
    LANES: gl.constexpr = V_FIELDS[0][3] * _planes_each(V_FIELDS[0][3])
    logits_mma: gl.constexpr = shared_logits_mma(GROUPS, warps)
    output_mma: gl.constexpr = shared_output_mma(warps)
    query: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, logits_mma))
    token: gl.constexpr = gl.SliceLayout(1, logits_mma)
    K_OFFSETS: gl.constexpr = (OFFSETS[0], OFFSETS[1])
    V_OFFSETS: gl.constexpr = (OFFSETS[2], OFFSETS[3])
    seen = gl.convert_layout(record_stop, query)
    m = gl.full((C,), NEVER, gl.float32, query)
    # what a thread has of a query comes first
    nothing = gl.reshape(gl.zeros((GROUPS, C, _GROUP), gl.float32, logits_mma), (GROUPS, C, _GROUP // EACH, EACH))
    few: gl.constexpr = gl.SliceLayout(2, nothing.type.layout)
    tokens: gl.constexpr = gl.SliceLayout(1, nothing.type.layout)
    mass, debt = _by_thread(nothing), _by_thread(nothing)
    of_threads: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, mass.type.layout))
    group = gl.arange(0, GROUPS, layout=gl.SliceLayout(1, token))
    lane = group[:, None] * _GROUP + gl.arange(0, _GROUP, layout=gl.SliceLayout(0, token))[None, :]
    lane = gl.convert_layout(gl.reshape(lane, (GROUPS, _GROUP // EACH, EACH)), tokens, assert_trivial=True)
    weights = weights_of(lane, G, V_FIELDS[0][0], V_FIELDS[0][1])
    acc = gl.zeros((C, D), gl.float32, output_mma)
    queries = ()
    for f in gl.static_range(len(K_FIELDS)):
        queries = queries + (_store_queries(q_parts, 2 if f == 0 else 1, K_FIELDS[f][3], warps),)
    shared = gl.allocate_shared_memory(gl.float16, [G // LANES * C, LANES], shared_operand_shared(LANES))
    slot = 0
    page = gl.load(table + gl.maximum(gl.minimum(begin + STAGES, stop - 1), 0))
    for tile in range(begin, stop):
        record = find_record(records_ptr, page, head, block_stride, tile_stride, head_stride, TILES)
        page = gl.load(table + gl.minimum(tile + STAGES + 1, stop - 1))
        async_copy.wait_group(2 * STAGES - 1)
        x, owed = _key_logits(k_words, k_vectors, slot, queries, K_FIELDS, GROUPS, C, warps)
        copy_next_half(k_words, k_vectors, record, slot, tile + STAGES < stop, K_FIELDS, K_OFFSETS, warps)
        x = gl.reshape(x, (GROUPS, C, _GROUP // EACH, EACH))
        owed = gl.convert_layout(owed, few, assert_trivial=True)
        owed *= q_scale / _DOWN
        unit = q_scale * CODE_UNIT
        if SOFTCAP > 0:
            x = cap(x * unit + owed[:, :, None, :], SOFTCAP)
            owed, unit = 0.0 * owed, 1.0
        if tile * G < sinks:
            x = gl.where((tile * G + lane >= sinks)[:, None, :, :], x, float("-inf"))
        if MASK_COLUMNS:
            hidden = gl.convert_layout((tile + 1) * G > seen, gl.SliceLayout(0, gl.SliceLayout(2, few)))
            owed = gl.where(hidden[None, :, None], float("-inf"), owed)
        largest = gl.max(_of_all(gl.max(x, axis=2) * unit + owed), axis=1)
        m_new = gl.maximum(m, gl.convert_layout(largest, query))
        decay = gl.exp2(m - m_new)
        ceiling = gl.convert_layout(m_new - WEIGHT_SHIFT, gl.SliceLayout(0, gl.SliceLayout(2, few)))
        p = gl.exp2(x * unit + (owed - ceiling[None, :, None])[:, :, None, :])
        async_copy.wait_group(2 * STAGES - 1)
        scale = _of_tokens(v_vectors[0].index(slot), EACH, token, tokens) * weights
        offset = _of_tokens(v_vectors[1].index(slot), EACH, token, tokens)
        of_thread = gl.convert_layout(decay, of_threads)[None, :, None]
        mass = mass * of_thread + _by_thread(p)
        debt = debt * of_thread + _by_thread(p * offset[:, None, :, :])
        scaled = _of_all(gl.reshape((p * scale[:, None, :, :]).to(gl.float16), (GROUPS, C, _GROUP)))
        scaled = gl.permute(gl.reshape(scaled, (C, G // LANES, LANES)), (1, 0, 2))
        shared.store(gl.reshape(scaled, (G // LANES * C, LANES)))
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, output_mma))[:, None]
        acc = _add_values(acc, shared, v_words, slot, G, V_FIELDS, warps)
        copy_next_half(v_words, v_vectors, record, slot, tile + STAGES < stop, V_FIELDS, V_OFFSETS, warps)
        m = m_new
        slot = (slot + 1) % STAGES
    total = gl.sum(_of_all(mass), axis=1)
    bias = gl.convert_layout(gl.sum(_of_all(debt), axis=1), gl.SliceLayout(1, output_mma))
    return m, total, gl.permute(acc * CODE_UNIT + bias[:, None], (1, 0))


@gluon.jit
def _of_tokens(vector, EACH: gl.constexpr, by_group: gl.constexpr, layout: gl.constexpr):
    """Load a vector of a tile's tokens, which lie by group at first, [groups, n, columns], float32."""
    GROUPS: gl.constexpr = vector.shape[0] // _GROUP
    x = gl.reshape(_by_group(vector, GROUPS).load(by_group), (GROUPS, _GROUP // EACH, EACH))
    return gl.convert_layout(x, layout, assert_trivial=True).to(gl.float32)
