"""Attention of absorbed queries over latent records, raw rows of the tail and the sinks, and the rows of this step.

A *column* is one query head of one query row, as in `kernels.attend`; here columns stand on the M side of both MMAs,
because there are many. The latent is key and value: a block of its rows is restored once, to fp16, and taken by both
products. The raw rows are taken in the same way, so the rounding of a query shifts all logits alike.
"""

import triton
import triton.language as tl

from kvarn.core.kernels.address import find_record
from kvarn.core.kernels.chain import allow_next, wait_for_previous
from kvarn.core.kernels.latent.restored import restored_channels, restored_rope
from kvarn.core.kernels.task import LOG2E, NEVER, WEIGHT_SHIFT, load_task, part_of_task
from kvarn.core.kernels.work import crossing, reading_of_task, share_of, task_at


@triton.jit
def _attend_rows(m, total, acc, q_latent, q_rope, q_scale, latent, rope, visible):
    """Fold rows into the running softmax. latent, rope: [tokens, channels], fp16; visible: [columns, tokens]."""
    x = tl.dot(q_rope, tl.trans(rope), tl.dot(q_latent, tl.trans(latent))) * q_scale[:, None]
    x = tl.where(visible, x, float("-inf"))
    m_new = tl.maximum(m, tl.max(x, axis=1))
    decay = tl.exp2(m - m_new)
    weights = tl.exp2(x - (m_new - WEIGHT_SHIFT)[:, None])
    acc = tl.dot(weights.to(tl.float16), latent, acc * decay[:, None])
    return m_new, total * decay + tl.sum(weights, axis=1), acc


@triton.jit
def _load_half(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32).to(tl.float16)


@triton.jit
def _attend_raw(m, total, acc, q_latent, q_rope, q_scale, row_ptrs, row_ok, visible, ROPE: tl.constexpr):
    """Fold a block of raw rows into the running softmax. row_ptrs, row_ok: [rows]; visible: [columns, rows]."""
    LATENT: tl.constexpr = acc.shape[1]
    latent = _load_half(row_ptrs[:, None] + tl.arange(0, LATENT)[None, :], row_ok[:, None])
    rope = _load_half(row_ptrs[:, None] + LATENT + tl.arange(0, ROPE)[None, :], row_ok[:, None])
    return _attend_rows(m, total, acc, q_latent, q_rope, q_scale, latent, rope, visible & row_ok[None, :])


@triton.jit(do_not_specialize=["tasks", "q_heads", "block_table_stride"])
def attend_latents_kernel(
    q_ptr, unit_ptr, records_ptr, tails_ptr, sinks_ptr, chunk_ptr, task_request_ptr, task_row_ptr, work_end_ptr,
    rows_ptr, prefix_ptr, length_ptr, own_start_ptr, sink_slot_ptr, query_start_ptr, block_table_ptr, partial_ptr,
    partial_lse_ptr, scale, tasks, q_heads, record_block_stride, record_tile_stride, tail_row_stride,
    sink_slot_stride, chunk_token_stride, block_table_stride,
    LATENT: tl.constexpr, ROPE: tl.constexpr, G: tl.constexpr, FIELDS: tl.constexpr, SCALES: tl.constexpr,
    ROPE_START: tl.constexpr, ROPE_FIELDS: tl.constexpr, ROPE_SCALES: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, RING: tl.constexpr, TILES: tl.constexpr,
    TAIL: tl.constexpr, SINK: tl.constexpr, ROWS_IN_RING: tl.constexpr, CANONICAL: tl.constexpr,
    RAW_BLOCK: tl.constexpr, TASK_BLOCK: tl.constexpr, SHARE: tl.constexpr, STAGES: tl.constexpr,
    USE_ASM: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program attends an equal stretch of all tasks' shares, for one block of heads. Grid: (programs, blocks).

    q: [tokens, q_heads, LATENT + ROPE], fp16, divided by unit [tokens, q_heads]. A share is SHARE units. The units of a
    task are the tiles that any column reads from records, TOKENS tokens at a time, then blocks of RAW_BLOCK ring rows,
    then blocks of this step's own rows. partial: [programs + tasks, blocks, COLUMNS, LATENT], float32; program p leaves
    its part of task t in row p + t, with its log-sum-exp (base 2) in partial_lse.
    """
    allow_next(CHAINED)
    wait_for_previous(CHAINED)
    program = tl.program_id(0)
    head_block = tl.program_id(1)
    share_begin, share_end = share_of(program, tl.num_programs(0), tl.load(work_end_ptr + tasks - 1))
    if share_begin >= share_end:
        return
    first_task = task_at(share_begin + crossing(SHARE), work_end_ptr, tasks, TASK_BLOCK)
    last_task = task_at(share_end - 1, work_end_ptr, tasks, TASK_BLOCK)
    ROW: tl.constexpr = LATENT + ROPE
    STEPS: tl.constexpr = G // TOKENS
    column = tl.arange(0, COLUMNS)
    channels = tl.arange(0, LATENT)
    block = tl.arange(0, RAW_BLOCK)
    for task in tl.range(first_task, last_task + 1, num_stages=1):
        begin, end = part_of_task(task, share_begin, share_end, work_end_ptr, SHARE)
        request, first_row, query_start, query_rows, prefix, length, own_start, sink_slot, ring_row = load_task(
            task, task_request_ptr, task_row_ptr, query_start_ptr, prefix_ptr, length_ptr, own_start_ptr, sink_slot_ptr,
            rows_ptr,
        )  # fmt: skip
        row, col_ok, position, record_stop, tiles, ring_units, chunk_units, raw_start, ring_end, chunk_start = (
            reading_of_task(
                column, first_row, query_rows, prefix, length, own_start, GROUP, ROWS, G, TAIL, RAW_BLOCK, ROWS_IN_RING,
                CANONICAL,
            )
        )  # fmt: skip

        q_row = (query_start + row).to(tl.int64) * q_heads + head_block * GROUP + column % GROUP
        q_ptrs = q_ptr + q_row[:, None] * ROW
        q_latent = tl.load(q_ptrs + channels[None, :], mask=col_ok[:, None], other=0.0)
        q_rope = tl.load(q_ptrs + LATENT + tl.arange(0, ROPE)[None, :], mask=col_ok[:, None], other=0.0)
        q_scale = tl.load(unit_ptr + q_row, mask=col_ok, other=0.0) * (scale * LOG2E)
        m = tl.full((COLUMNS,), NEVER, tl.float32)
        total = tl.zeros((COLUMNS,), tl.float32)
        acc = tl.zeros((COLUMNS, LATENT), tl.float32)

        sinks = SINK if sink_slot >= 0 else 0
        table = block_table_ptr + request.to(tl.int64) * block_table_stride
        for part in tl.range(begin * STEPS, tl.minimum(end, tiles) * STEPS, num_stages=STAGES):
            tile = part // STEPS
            token = part % STEPS * TOKENS + tl.arange(0, TOKENS)
            record = find_record(
                records_ptr, tl.load(table + tile), 0, record_block_stride, record_tile_stride, 0, TILES
            )  # fmt: skip
            latent = restored_channels(record, token, LATENT, FIELDS, SCALES, USE_ASM)
            rope = restored_rope(record, token, ROPE, ROPE_START, ROPE_FIELDS, ROPE_SCALES, USE_ASM)
            visible = (tile * G + token >= sinks)[None, :] & ((tile + 1) * G <= record_stop)[:, None]
            m, total, acc = _attend_rows(m, total, acc, q_latent, q_rope, q_scale, latent, rope, visible)

        if (SINK > 0) & (begin <= tiles) & (tiles < end) & (tiles > 0) & (sink_slot >= 0):
            sink_rows = sinks_ptr + sink_slot * sink_slot_stride + block * ROW
            m, total, acc = _attend_raw(
                m, total, acc, q_latent, q_rope, q_scale, sink_rows, block < SINK, (record_stop > 0)[:, None], ROPE
            )
        for unit in tl.range(tl.maximum(begin - tiles, 0), tl.minimum(end - tiles, ring_units), num_stages=1):
            pos = raw_start + unit * RAW_BLOCK + block
            ring_rows = tails_ptr + ring_row * tail_row_stride + (pos % RING) * ROW
            visible = (pos[None, :] >= record_stop[:, None]) & (pos[None, :] <= position[:, None]) & col_ok[:, None]
            m, total, acc = _attend_raw(
                m, total, acc, q_latent, q_rope, q_scale, ring_rows, pos < ring_end, visible, ROPE
            )
        if not ROWS_IN_RING:
            seen = tiles + ring_units
            for unit in tl.range(tl.maximum(begin - seen, 0), tl.minimum(end - seen, chunk_units), num_stages=1):
                pos = chunk_start + unit * RAW_BLOCK + block
                own_rows = chunk_ptr + (query_start + pos - prefix).to(tl.int64) * chunk_token_stride
                visible = (pos[None, :] >= record_stop[:, None]) & (pos[None, :] <= position[:, None])
                m, total, acc = _attend_raw(
                    m, total, acc, q_latent, q_rope, q_scale, own_rows, pos < length, visible & col_ok[:, None], ROPE
                )

        out_ok = col_ok & (begin < end)
        out_row = ((program + task).to(tl.int64) * tl.num_programs(1) + head_block) * COLUMNS + column
        lse = tl.where(total > 0, m + tl.log2(tl.maximum(total, 1e-37)) - WEIGHT_SHIFT, float("-inf"))
        tl.store(partial_lse_ptr + out_row, lse, mask=out_ok)
        mask = (out_ok & (total > 0))[:, None]
        tl.store(
            partial_ptr + out_row[:, None] * LATENT + channels[None, :],
            acc / tl.maximum(total, 1e-37)[:, None],
            mask=mask,
        )
