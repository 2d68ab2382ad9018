"""Attention over records, raw rows of the tail and the sinks, and the rows of this step, in partial results.

Operands are swapped: tokens (for K) or channels (for V) stand on the wide side of the MMA, query columns on the narrow
one. A *column* is one query head of one query row, so that all heads of a kv head and several query rows share one
unpacking of a tile. Scales stay outside the inner products: those of K are folded into q, once for every group of
tokens, those of V into the weights.
"""

import triton
import triton.language as tl

from kvarn.core.kernels.address import find_record
from kvarn.core.kernels.chain import allow_next, wait_for_previous, wait_for_queries
from kvarn.core.kernels.hadamard import load_in_fours
from kvarn.core.kernels.task import (
    LOG2E,
    NEVER,
    WEIGHT_SHIFT,
    cap,
    load_task,
    part_of_task,
    query_unit,
    wait_for_records,
)
from kvarn.core.kernels.unpack import BIAS, lane_codes, lane_weights, one_below_other, padded_words, unpack
from kvarn.core.kernels.work import crossing, reading_of_task, share_of, task_at


@triton.jit
def _query_lanes(q_cols, col_ok, q_unit, D: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr):
    """Load q, rotated, in the order of a key field's lanes: [lanes, columns], float32, divided by q_unit."""
    channel, lane_ok = lane_codes(BITS, WORDS)
    return load_in_fours(q_cols[None, :], channel[:, None], lane_ok[:, None] & col_ok[None, :], D) / q_unit


@triton.jit
def _load_pair(ptrs, DISTANCE: tl.constexpr, ok, PADDED: tl.constexpr):
    """Load two vectors that lie DISTANCE halfs apart, float32; elements of padding give zero.

    One load, because each thread must get four bytes for the copy to shared memory to be asynchronous.
    """
    both = ptrs[:, None] + tl.arange(0, 2)[None, :] * DISTANCE
    if PADDED:
        values = tl.load(both, mask=ok[:, None], other=0)
    else:
        values = tl.load(both)
    first, second = tl.split(values)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _load_words(record, rows, OFFSET: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr):
    """Load a field's words, [rows, padded words], int16; rows from ROWS on and words of padding give zero."""
    word = tl.arange(0, padded_words(WORDS))
    ptrs = record.to(tl.pointer_type(tl.int16)) + OFFSET // 2 + rows[:, None] * WORDS + word[None, :]
    if padded_words(WORDS) == WORDS and rows.shape[0] == ROWS:
        words = tl.load(ptrs)
    else:
        words = tl.load(ptrs, mask=(rows < ROWS)[:, None] & (word < WORDS)[None, :], other=0)
    return words


@triton.jit
def _add_key_field(
    x, record, q_lanes, FIRST: tl.constexpr, BITS: tl.constexpr, LOW_BIT: tl.constexpr, OFFSET: tl.constexpr,
    WORDS: tl.constexpr, K_SCALE: tl.constexpr, K_OFFSET: tl.constexpr, G: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """Add one field's part of ``q . (code * scale + offset)`` to x, [tokens, columns]; also the bias correction.

    The tokens, from FIRST on, share the scales and offsets at bytes K_SCALE and K_OFFSET.
    """
    channel, lane_ok = lane_codes(BITS, WORDS)
    padded: tl.constexpr = padded_words(WORDS) != WORDS
    halfs = record.to(tl.pointer_type(tl.float16))
    words = _load_words(record, FIRST + tl.arange(0, x.shape[0]), OFFSET, WORDS, G)
    scale, offset = _load_pair(halfs + K_SCALE // 2 + channel, (K_OFFSET - K_SCALE) // 2, lane_ok, padded)
    scaled = (q_lanes * (scale * lane_weights(BITS, LOW_BIT, WORDS))[:, None]).to(tl.float16)
    x = tl.dot(unpack(words, BITS, USE_ASM), scaled, x)
    correction = -BIAS * scaled.to(tl.float32)
    if LOW_BIT == 0:
        correction += q_lanes * offset[:, None]
    return x, tl.sum(correction, axis=0)


@triton.jit
def _group_logits(
    record, first_lanes, second_lanes, GROUP: tl.constexpr, GROUP_TOKENS: tl.constexpr, K_FIELDS: tl.constexpr,
    OFFSETS: tl.constexpr, D: tl.constexpr, G: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """Return q . k of one group of a record's tokens, [tokens, columns]."""
    FIRST: tl.constexpr = GROUP * GROUP_TOKENS
    SCALE: tl.constexpr = OFFSETS[0] + 2 * GROUP * D
    OFFSET: tl.constexpr = OFFSETS[1] + 2 * GROUP * D
    x = tl.zeros((GROUP_TOKENS, first_lanes.shape[1]), tl.float32)
    x, shift = _add_key_field(x, record, first_lanes, FIRST, K_FIELDS[0][0], K_FIELDS[0][1], K_FIELDS[0][2],
                              K_FIELDS[0][3], SCALE, OFFSET, G, USE_ASM)  # fmt: skip
    if len(K_FIELDS) == 2:
        x, more = _add_key_field(x, record, second_lanes, FIRST, K_FIELDS[1][0], K_FIELDS[1][1], K_FIELDS[1][2],
                                 K_FIELDS[1][3], SCALE, OFFSET, G, USE_ASM)  # fmt: skip
        shift += more
    return x + shift[None, :]


@triton.jit
def _add_value_field(
    o, record, weights, v_scale, BITS: tl.constexpr, LOW_BIT: tl.constexpr, OFFSET: tl.constexpr,
    WORDS: tl.constexpr, D: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """Add one field's part of ``sum of weight * code * scale`` to o, [channels, columns]; also the bias correction."""
    words = _load_words(record, tl.arange(0, o.shape[0]), OFFSET, WORDS, D)
    scaled = (weights * (v_scale * lane_weights(BITS, LOW_BIT, WORDS))[:, None]).to(tl.float16)
    return tl.dot(unpack(words, BITS, USE_ASM), scaled, o), -BIAS * scaled.to(tl.float32)


@triton.jit
def _attend_raw(
    m, total, acc, q_high, q_low, q_scale, k_ptrs, v_ptrs, row_ok, ok, D: tl.constexpr, SOFTCAP: tl.constexpr
):
    """Fold a block of raw rows into the running softmax. k_ptrs, v_ptrs: [rows]; ok: [rows, columns].

    q comes in two fp16 parts: where keys share a large constant part (a key bias), the rounding of a single part would
    shift the logits of all raw rows against those of the records.
    """
    channels = tl.arange(0, acc.shape[0])
    mask = row_ok[:, None] & (channels < D)[None, :]
    k = tl.load(k_ptrs[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32).to(tl.float16)
    v = tl.load(v_ptrs[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32).to(tl.float16)
    x = tl.dot(k, q_low, tl.dot(k, q_high)) * q_scale
    if SOFTCAP > 0:
        x = cap(x, SOFTCAP)
    x = tl.where(ok, x, float("-inf"))
    m_new = tl.maximum(m, tl.max(x, axis=0))
    decay = tl.exp2(m - m_new)
    weights = tl.exp2(x - (m_new - WEIGHT_SHIFT)[None, :])
    acc = acc * decay[None, :] + tl.dot(tl.trans(v), weights.to(tl.float16))
    return m_new, total * decay + tl.sum(weights, axis=0), acc


@triton.jit
def _attend_tile(
    m, total, acc, record, first_lanes, second_lanes, q_scale, token_ok, column_ok, K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr, OFFSETS: tl.constexpr, GROUP_TOKENS: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    SOFTCAP: tl.constexpr, MASK_COLUMNS: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """Fold one record into the running softmax. token_ok: [G]; column_ok: [columns], looked at with MASK_COLUMNS."""
    tokens = tl.arange(0, G)
    halfs = record.to(tl.pointer_type(tl.float16))
    x = _group_logits(record, first_lanes, second_lanes, 0, GROUP_TOKENS, K_FIELDS, OFFSETS, D, G, USE_ASM)
    if G > GROUP_TOKENS:
        after = _group_logits(record, first_lanes, second_lanes, 1, GROUP_TOKENS, K_FIELDS, OFFSETS, D, G, USE_ASM)
        x = one_below_other(x, after)
    x *= q_scale
    if SOFTCAP > 0:
        x = cap(x, SOFTCAP)
    x += tl.where(token_ok, 0.0, float("-inf"))[:, None]
    if MASK_COLUMNS:
        x = tl.where(column_ok[None, :], x, float("-inf"))
    m_new = tl.maximum(m, tl.max(x, axis=0))
    decay = tl.exp2(m - m_new)
    weights = tl.exp2(x - (m_new - WEIGHT_SHIFT)[None, :])
    v_scale, v_offset = _load_pair(halfs + OFFSETS[2] // 2 + tokens, (OFFSETS[3] - OFFSETS[2]) // 2, tokens >= 0, False)
    shift = weights * v_offset[:, None]
    o = tl.zeros((acc.shape[0], acc.shape[1]), tl.float32)
    for f in tl.static_range(len(V_FIELDS)):
        o, more = _add_value_field(o, record, weights, v_scale, V_FIELDS[f][0], V_FIELDS[f][1], V_FIELDS[f][2],
                                   V_FIELDS[f][3], D, USE_ASM)  # fmt: skip
        shift += more
    acc = acc * decay[None, :] + o + tl.sum(shift, axis=0)[None, :]
    return m_new, total * decay + tl.sum(weights, axis=0), acc


@triton.jit(do_not_specialize=["tasks", "block_table_stride"])
def attend_kernel(
    q_ptr, records_ptr, tails_ptr, sinks_ptr, chunk_k_ptr, chunk_v_ptr,
    task_request_ptr, task_row_ptr, work_end_ptr, rows_ptr, prefix_ptr, length_ptr, own_start_ptr, sink_slot_ptr,
    query_start_ptr, block_table_ptr, partial_ptr, partial_lse_ptr, fills_ptr, scale, tasks,
    q_token_stride, q_head_stride, record_block_stride, record_tile_stride, record_head_stride, tail_row_stride,
    tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride, sink_head_stride, chunk_token_stride,
    chunk_head_stride, block_table_stride,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, RING: tl.constexpr, TILES: tl.constexpr, TAIL: tl.constexpr,
    SINK: tl.constexpr, K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr, OFFSETS: tl.constexpr,
    GROUP_TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, ROWS_IN_RING: tl.constexpr, CANONICAL: tl.constexpr,
    RAW_BLOCK: tl.constexpr, TASK_BLOCK: tl.constexpr, SHARE: tl.constexpr, STAGES: tl.constexpr,
    USE_ASM: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program attends an equal stretch of all tasks' shares, for one kv head. Grid: (programs, kv_heads).

    A share is SHARE units. The units of a task are the tiles that any column reads from records, then blocks of
    RAW_BLOCK ring rows, then blocks of this step's own rows. partial: [programs + tasks, kv_heads, COLUMNS, D],
    float32; program p leaves its part of task t in row p + t, with its log-sum-exp (base 2) in partial_lse.
    """
    allow_next(CHAINED)
    program = tl.program_id(0)
    head = tl.program_id(1)
    share_begin, share_end = share_of(program, tl.num_programs(0), tl.load(work_end_ptr + tasks - 1))
    if share_begin >= share_end:
        wait_for_previous(CHAINED)
        return
    first_task = task_at(share_begin + crossing(SHARE), work_end_ptr, tasks, TASK_BLOCK)
    last_task = task_at(share_end - 1, work_end_ptr, tasks, TASK_BLOCK)
    column = tl.arange(0, COLUMNS)
    channels = tl.arange(0, DP)
    tokens = tl.arange(0, G)
    block = tl.arange(0, RAW_BLOCK)
    for task in tl.range(first_task, last_task + 1, num_stages=1):
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

        wait_for_queries(fills_ptr, CHAINED)
        q_cols = q_ptr + (query_start + row).to(tl.int64) * q_token_stride
        q_cols += (head * GROUP + column % GROUP) * q_head_stride
        q_full = load_in_fours(q_cols[None, :], channels[:, None], (channels < D)[:, None] & col_ok[None, :], D)
        # Columns far below the largest are rounded more coarsely, but their logits move by no more than its do.
        q_unit = query_unit(tl.max(tl.abs(q_full)))
        q_scale = q_unit * (scale * LOG2E)
        m = tl.full((COLUMNS,), NEVER, tl.float32)
        total = tl.zeros((COLUMNS,), tl.float32)
        acc = tl.zeros((DP, COLUMNS), tl.float32)

        sinks = SINK if sink_slot >= 0 else 0
        first_lanes = _query_lanes(q_cols, col_ok, q_unit, D, K_FIELDS[0][0], K_FIELDS[0][3])
        second_lanes = first_lanes
        if len(K_FIELDS) == 2 and padded_words(K_FIELDS[1][3]) != K_FIELDS[1][3]:
            second_lanes = _query_lanes(q_cols, col_ok, q_unit, D, K_FIELDS[1][0], K_FIELDS[1][3])
        table = block_table_ptr + request.to(tl.int64) * block_table_stride
        for tile in tl.range(begin, tl.minimum(end, tiles), num_stages=STAGES):
            record = find_record(
                records_ptr, tl.load(table + tile), head, record_block_stride, record_tile_stride, record_head_stride,
                TILES,
            )  # fmt: skip
            m, total, acc = _attend_tile(
                m, total, acc, record, first_lanes, second_lanes, q_scale, tile * G + tokens >= sinks,
                (tile + 1) * G <= record_stop, K_FIELDS, V_FIELDS, OFFSETS, GROUP_TOKENS, D, G, SOFTCAP, ROWS > 1,
                USE_ASM,
            )  # fmt: skip

        wait_for_previous(CHAINED)
        q_full = q_full / q_unit
        q_high = q_full.to(tl.float16)
        q_low = (q_full - q_high.to(tl.float32)).to(tl.float16)
        if (SINK > 0) & (begin <= tiles) & (tiles < end) & (tiles > 0) & (sink_slot >= 0):
            base = sinks_ptr + sink_slot * sink_slot_stride + head * sink_head_stride + block * D
            visible = (block < SINK)[:, None] & (record_stop > 0)[None, :]
            m, total, acc = _attend_raw(
                m, total, acc, q_high, q_low, q_scale, base, base + sink_kv_stride, block < SINK, visible, D, SOFTCAP
            )
        for unit in tl.range(tl.maximum(begin - tiles, 0), tl.minimum(end - tiles, ring_units), num_stages=2):
            pos = raw_start + unit * RAW_BLOCK + block
            base = tails_ptr + ring_row * tail_row_stride + head * tail_head_stride + (pos % RING) * D
            visible = (pos[:, None] >= record_stop[None, :]) & (pos[:, None] <= position[None, :])
            m, total, acc = _attend_raw(
                m, total, acc, q_high, q_low, q_scale, base, base + tail_kv_stride, pos < ring_end,
                visible & (pos < ring_end)[:, None] & col_ok[None, :], D, SOFTCAP,
            )  # fmt: skip
        if not ROWS_IN_RING:
            seen = tiles + ring_units
            for unit in tl.range(tl.maximum(begin - seen, 0), tl.minimum(end - seen, chunk_units), num_stages=2):
                pos = chunk_start + unit * RAW_BLOCK + block
                offset = (query_start + pos - prefix).to(tl.int64) * chunk_token_stride + head * chunk_head_stride
                visible = (pos[:, None] >= record_stop[None, :]) & (pos[:, None] <= position[None, :])
                m, total, acc = _attend_raw(
                    m, total, acc, q_high, q_low, q_scale, chunk_k_ptr + offset, chunk_v_ptr + offset, pos < length,
                    visible & col_ok[None, :], D, SOFTCAP,
                )  # fmt: skip

        out_ok = col_ok & (begin < end)
        out_row = ((program + task).to(tl.int64) * tl.num_programs(1) + head) * COLUMNS + column
        lse = tl.where(total > 0, m + tl.log2(tl.maximum(total, 1e-37)) - WEIGHT_SHIFT, float("-inf"))
        tl.store(partial_lse_ptr + out_row, lse, mask=out_ok)
        out_ptrs = partial_ptr + out_row[None, :] * D + channels[:, None]
        mask = (channels < D)[:, None] & (out_ok & (total > 0))[None, :]
        tl.store(out_ptrs, acc / tl.maximum(total, 1e-37)[None, :], mask=mask)
