"""Rotate and store the rows of a decode step and seal the tiles that they fill, in one launch."""

import triton
import triton.language as tl

from kvarn.core.kernels.chain import allow_next, allow_next_early, wait_for_previous
from kvarn.core.kernels.hadamard import hadamard, load_in_fours
from kvarn.core.kernels.rotate import RAW_MAX, load_places, store_rows
from kvarn.core.kernels.seal import seal_tasks


@triton.jit(do_not_specialize=["tasks", "block_table_stride"])
def append_kernel(
    k_ptr, v_ptr, k_out_ptr, v_out_ptr, tails_ptr, sinks_ptr, records_ptr, task_request_ptr, task_tile_ptr, rows_ptr,
    sink_slot_ptr, prefix_ptr, length_ptr, query_start_ptr, block_table_ptr, fills_ptr, tasks,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride, record_block_stride, record_tile_stride,
    record_head_stride, tail_row_stride, tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride,
    sink_head_stride, block_table_stride,
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
    allow_next_early(fills_ptr, CHAINED)
    programs = tl.num_programs(0)
    head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    which = tl.program_id(2)
    channels = tl.arange(0, DP)
    # asked for early: few requests fill a tile, and a program whose requests don't has nothing to wait for afterwards
    task = tl.program_id(0) + tl.arange(0, BLOCK) * programs
    first_tiles = tl.load(task_tile_ptr + task, mask=task < tasks, other=-1)
    for start in tl.range(tl.program_id(0), tasks, programs * ROWS_AT_ONCE, num_stages=1):
        token = start + tl.arange(0, ROWS_AT_ONCE) * programs
        ok = token < tasks
        # a step is described long before: its numbers are asked for before the rows are there
        request = tl.load(task_request_ptr + token, mask=ok, other=0)
        position = tl.load(prefix_ptr + token, mask=ok, other=0)
        ring_row, sink_slot = load_places(request, ok, rows_ptr, sink_slot_ptr, SINK)
        wait_for_previous(CHAINED)
        allow_next(CHAINED)
        wide = token.to(tl.int64)
        mask = ok[:, None] & (channels < D)[None, :]
        if which == 0:
            y = load_in_fours(
                (k_ptr + wide * k_token_stride + head * k_head_stride)[:, None], channels[None, :], mask, D
            )
            out_ptrs = k_out_ptr + (wide * kv_heads + head) * D
        else:
            in_ptrs = v_ptr + wide * v_token_stride + head * v_head_stride
            y = hadamard(tl.load(in_ptrs[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32)) * NORM
            out_ptrs = v_out_ptr + (wide * kv_heads + head) * D
        raw = tl.minimum(tl.maximum(y, -RAW_MAX), RAW_MAX).to(k_out_ptr.dtype.element_ty)
        tl.store(out_ptrs[:, None] + channels[None, :], raw, mask=mask)
        store_rows(
            raw, position, ring_row, sink_slot, ok, ok, which, head, tails_ptr, sinks_ptr, tail_row_stride,
            tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride, sink_head_stride, D, RING, SINK,
        )  # fmt: skip
    if (tl.max(first_tiles, axis=0) >= 0) | (tasks > programs * BLOCK):
        # a program's threads seal what others of its threads have stored
        tl.debug_barrier()
        seal_tasks(
            tails_ptr, k_out_ptr, v_out_ptr, records_ptr, task_request_ptr, task_tile_ptr, rows_ptr, prefix_ptr,
            length_ptr, query_start_ptr, block_table_ptr, tasks, record_block_stride, record_tile_stride,
            record_head_stride, tail_row_stride, tail_kv_stride, tail_head_stride, 0, 0, block_table_stride, D, DP, G,
            RING, TILES, K_FIELDS, V_FIELDS, OFFSETS, GROUP_TOKENS, KEY_BITS, VALUE_BITS, KEY_CLIP, VALUE_CLIP,
            SCALE_MAX, True, BLOCK,
        )  # fmt: skip
