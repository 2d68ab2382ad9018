"""Rotate and store the rows of a decode step or of chunks, and seal the tiles that they fill, in one launch."""

import triton
import triton.language as tl

from kvarn.core.kernels.chain import allow_next, wait_for_previous
from kvarn.core.kernels.hadamard import hadamard, load_in_fours
from kvarn.core.kernels.rotate import RAW_MAX, store_rows
from kvarn.core.kernels.seal import seal_tasks, seal_tile


@triton.jit
def _append_rows(
    token, ok, ring_ok, k_ptr, v_ptr, k_out_ptr, v_out_ptr, tails_ptr, sinks_ptr, token_request_ptr, token_position_ptr,
    rows_ptr, sink_slot_ptr, k_token_stride, k_head_stride, v_token_stride, v_head_stride, tail_row_stride,
    tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride, sink_head_stride, D: tl.constexpr,
    DP: tl.constexpr, NORM: tl.constexpr, RING: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """Rotate the keys or values of some tokens of one head; store them in the output, rings (ring_ok) and sinks."""
    head = tl.program_id(1)
    which = tl.program_id(2)
    channels = tl.arange(0, DP)
    wide = token.to(tl.int64)
    mask = ok[:, None] & (channels < D)[None, :]
    out = (wide * tl.num_programs(1) + head) * D
    if which == 0:
        y = load_in_fours((k_ptr + wide * k_token_stride + head * k_head_stride)[:, None], channels[None, :], mask, D)
        out_ptrs = k_out_ptr + out
    else:
        in_ptrs = v_ptr + wide * v_token_stride + head * v_head_stride
        y = hadamard(tl.load(in_ptrs[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32)) * NORM
        out_ptrs = v_out_ptr + out
    raw = tl.minimum(tl.maximum(y, -RAW_MAX), RAW_MAX).to(k_out_ptr.dtype.element_ty)
    tl.store(out_ptrs[:, None] + channels[None, :], raw, mask=mask)
    store_rows(
        raw, token, ring_ok, ok, which, head, tails_ptr, sinks_ptr, token_request_ptr, token_position_ptr, rows_ptr,
        sink_slot_ptr, tail_row_stride, tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride,
        sink_head_stride, D, RING, SINK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tasks", "block_table_stride"])
def append_kernel(
    k_ptr, v_ptr, k_out_ptr, v_out_ptr, tails_ptr, sinks_ptr, records_ptr, task_request_ptr, task_tile_ptr, rows_ptr,
    sink_slot_ptr, prefix_ptr, length_ptr, query_start_ptr, block_table_ptr, tasks, k_token_stride, k_head_stride,
    v_token_stride, v_head_stride, record_block_stride, record_tile_stride, record_head_stride, tail_row_stride,
    tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride, sink_head_stride, block_table_stride,
    D: tl.constexpr, DP: tl.constexpr, NORM: tl.constexpr, G: tl.constexpr, RING: tl.constexpr, SINK: tl.constexpr,
    TILES: tl.constexpr, K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr, OFFSETS: tl.constexpr,
    GROUP_TOKENS: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_CLIP: tl.constexpr,
    VALUE_CLIP: tl.constexpr, SCALE_MAX: tl.constexpr, ROWS_AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid: as of `seal_kernel`, (programs, kv_heads, 2). Program p has requests p, p + programs and so on.

    Every request has one token, which is its task. What a program seals, it has stored itself or an earlier step has. D
    is a power of two; ROWS_AT_ONCE: tokens that are rotated together; BLOCK: as of `seal_kernel`.
    """
    wait_for_previous(CHAINED)
    allow_next(CHAINED)
    programs = tl.num_programs(0)
    for start in tl.range(tl.program_id(0), tasks, programs * ROWS_AT_ONCE, num_stages=1):
        token = start + tl.arange(0, ROWS_AT_ONCE) * programs
        ok = token < tasks
        _append_rows(
            token, ok, ok, k_ptr, v_ptr, k_out_ptr, v_out_ptr, tails_ptr, sinks_ptr, task_request_ptr, prefix_ptr,
            rows_ptr, sink_slot_ptr, k_token_stride, k_head_stride, v_token_stride, v_head_stride, tail_row_stride,
            tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride, sink_head_stride, D, DP, NORM, RING,
            SINK,
        )  # fmt: skip
    # a program's threads seal what others of its threads have stored
    tl.debug_barrier()
    seal_tasks(
        tails_ptr, k_out_ptr, v_out_ptr, records_ptr, task_request_ptr, task_tile_ptr, rows_ptr, prefix_ptr,
        length_ptr, query_start_ptr, block_table_ptr, tasks, record_block_stride, record_tile_stride,
        record_head_stride, tail_row_stride, tail_kv_stride, tail_head_stride, 0, 0, block_table_stride, D, DP, G,
        RING, TILES, K_FIELDS, V_FIELDS, OFFSETS, GROUP_TOKENS, KEY_BITS, VALUE_BITS, KEY_CLIP, VALUE_CLIP, SCALE_MAX,
        True, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tasks", "block_table_stride"])
def append_chunk_kernel(
    k_ptr, v_ptr, k_out_ptr, v_out_ptr, tails_ptr, sinks_ptr, records_ptr, task_request_ptr, task_tile_ptr, rows_ptr,
    sink_slot_ptr, prefix_ptr, length_ptr, query_start_ptr, token_request_ptr, token_position_ptr, block_table_ptr,
    tasks, k_token_stride, k_head_stride, v_token_stride, v_head_stride, record_block_stride, record_tile_stride,
    record_head_stride, tail_row_stride, tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride,
    sink_head_stride, block_table_stride,
    D: tl.constexpr, DP: tl.constexpr, NORM: tl.constexpr, G: tl.constexpr, RING: tl.constexpr, SINK: tl.constexpr,
    TILES: tl.constexpr, K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr, OFFSETS: tl.constexpr,
    GROUP_TOKENS: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_CLIP: tl.constexpr,
    VALUE_CLIP: tl.constexpr, SCALE_MAX: tl.constexpr, STORE: tl.constexpr, ROWS_AT_ONCE: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid: (tasks + requests * G / ROWS_AT_ONCE, kv_heads, 2); the last axis is keys, values.

    The first programs have one task each: they rotate what the step adds to a tile that becomes full, and seal it. The
    others rotate what it adds to the open tile of a request. STORE: rings get the newest rows. D is a power of two;
    ROWS_AT_ONCE: tokens that are rotated together.
    """
    wait_for_previous(CHAINED)
    allow_next(CHAINED)
    program = tl.program_id(0)
    parts: tl.constexpr = G // ROWS_AT_ONCE
    sealing = program < tasks
    if sealing:
        tile = tl.load(task_tile_ptr + program)
        request = tl.load(task_request_ptr + program)
    else:
        request = (program - tasks) // parts
        tile = tl.load(length_ptr + request) // G
    prefix = tl.load(prefix_ptr + request)
    length = tl.load(length_ptr + request)
    first = tl.load(query_start_ptr + request) - prefix
    begin = tl.maximum(tile * G, prefix)
    end = tl.minimum(tile * G + G, length)
    if not sealing:
        begin += (program - tasks) % parts * ROWS_AT_ONCE
        end = tl.minimum(end, begin + ROWS_AT_ONCE)
    if tile >= 0:
        for start in tl.range(begin, end, ROWS_AT_ONCE, num_stages=1):
            position = start + tl.arange(0, ROWS_AT_ONCE)
            ok = position < end
            # older rows of the chunk would share ring places with newer ones
            ring_ok = ok & (position >= length - RING) & STORE
            _append_rows(
                first + position, ok, ring_ok, k_ptr, v_ptr, k_out_ptr, v_out_ptr, tails_ptr, sinks_ptr,
                token_request_ptr, token_position_ptr, rows_ptr, sink_slot_ptr, k_token_stride, k_head_stride,
                v_token_stride, v_head_stride, tail_row_stride, tail_kv_stride, tail_head_stride, sink_slot_stride,
                sink_kv_stride, sink_head_stride, D, DP, NORM, RING, SINK,
            )  # fmt: skip
        if sealing:
            # a program's threads seal what others of its threads have stored
            tl.debug_barrier()
            seal_tile(
                program, tile, tails_ptr, k_out_ptr, v_out_ptr, records_ptr, task_request_ptr, rows_ptr, prefix_ptr,
                length_ptr, query_start_ptr, block_table_ptr, record_block_stride, record_tile_stride,
                record_head_stride, tail_row_stride, tail_kv_stride, tail_head_stride, tl.num_programs(1) * D, D,
                block_table_stride, D, DP, G, RING, TILES, K_FIELDS, V_FIELDS, OFFSETS, GROUP_TOKENS, KEY_BITS,
                VALUE_BITS, KEY_CLIP, VALUE_CLIP, SCALE_MAX, False,
            )  # fmt: skip
