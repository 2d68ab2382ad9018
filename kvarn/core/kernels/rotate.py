"""Rotate the rows of a step: queries to float32, keys and values to the model dtype, optionally into the ring."""

import triton
import triton.language as tl

from kvarn.core.kernels.chain import wait_for_previous

# The largest number that is finite in fp16 and exact in bf16: rotated rows are clamped to it.
_RAW_MAX = tl.constexpr(65280.0)


@triton.jit
def rotate_kernel(
    q_ptr, k_ptr, v_ptr, signs_ptr, q_out_ptr, k_out_ptr, v_out_ptr, tails_ptr, sinks_ptr,
    token_request_ptr, token_position_ptr, rows_ptr, sink_slot_ptr, num_tokens,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    tail_row_stride, tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride, sink_head_stride,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, NORM: tl.constexpr,
    RING: tl.constexpr, SINK: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of tokens, q heads + 2 kv heads). Outputs are contiguous [tokens, heads, D]."""
    wait_for_previous(CHAINED)
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token_ok = token < num_tokens
    wide = token.to(tl.int64)
    channels = tl.arange(0, DP)
    channel_ok = channels < D
    mask = token_ok[:, None] & channel_ok[None, :]
    if head < Q_HEADS:
        in_ptrs = q_ptr + wide * q_token_stride + head * q_head_stride
    elif head < Q_HEADS + KV_HEADS:
        in_ptrs = k_ptr + wide * k_token_stride + (head - Q_HEADS) * k_head_stride
    else:
        in_ptrs = v_ptr + wide * v_token_stride + (head - Q_HEADS - KV_HEADS) * v_head_stride
    y = tl.zeros((BLOCK, DP), tl.float32)
    for start in tl.static_range(0, DP, CHUNK):
        part = start + tl.arange(0, CHUNK)
        part_ok = part < D
        x = tl.load(in_ptrs[:, None] + part[None, :], mask=token_ok[:, None] & part_ok[None, :], other=0.0)
        signs = tl.load(
            signs_ptr + part[:, None] * D + channels[None, :], mask=part_ok[:, None] & channel_ok[None, :], other=0.0
        )
        y = tl.dot(x, signs, y)
    y *= NORM
    if head < Q_HEADS:
        q_ptrs = q_out_ptr + (wide * Q_HEADS + head) * D
        tl.store(q_ptrs[:, None] + channels[None, :], y, mask=mask)
    else:
        which = (head - Q_HEADS) // KV_HEADS  # 0 for keys, 1 for values
        kv_head = (head - Q_HEADS) % KV_HEADS
        raw = tl.minimum(tl.maximum(y, -_RAW_MAX), _RAW_MAX).to(k_out_ptr.dtype.element_ty)
        if which == 0:
            out_ptrs = k_out_ptr + (wide * KV_HEADS + kv_head) * D
        else:
            out_ptrs = v_out_ptr + (wide * KV_HEADS + kv_head) * D
        tl.store(out_ptrs[:, None] + channels[None, :], raw, mask=mask)
        if STORE:
            store_rows(
                raw, token, token_ok, token_ok, which, kv_head, tails_ptr, sinks_ptr, token_request_ptr,
                token_position_ptr, rows_ptr, sink_slot_ptr, tail_row_stride, tail_kv_stride, tail_head_stride,
                sink_slot_stride, sink_kv_stride, sink_head_stride, D, RING, SINK,
            )  # fmt: skip


@triton.jit
def store_rows(
    raw, token, ring_ok, token_ok, which, kv_head, tails_ptr, sinks_ptr, token_request_ptr, token_position_ptr,
    rows_ptr, sink_slot_ptr, tail_row_stride, tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride,
    sink_head_stride, D: tl.constexpr, RING: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """Write rotated rows [tokens, DP] of one kv head to their requests' rings and, the first ones, to the sinks."""
    channels = tl.arange(0, raw.shape[1])
    channel_ok = channels < D
    request = tl.load(token_request_ptr + token, mask=token_ok, other=0)
    position = tl.load(token_position_ptr + token, mask=token_ok, other=0)
    ring_row = tl.load(rows_ptr + request, mask=token_ok, other=0).to(tl.int64)
    ring = tails_ptr + ring_row * tail_row_stride + which * tail_kv_stride + kv_head * tail_head_stride
    ring += (position % RING) * D
    tl.store(ring[:, None] + channels[None, :], raw, mask=ring_ok[:, None] & channel_ok[None, :])
    if SINK > 0:
        slot = tl.load(sink_slot_ptr + request, mask=token_ok, other=-1).to(tl.int64)
        sink_ok = token_ok & (slot >= 0) & (position < SINK)
        sink = sinks_ptr + slot * sink_slot_stride + which * sink_kv_stride + kv_head * sink_head_stride + position * D
        tl.store(sink[:, None] + channels[None, :], raw, mask=sink_ok[:, None] & channel_ok[None, :])


@triton.jit
def store_tail_kernel(
    k_ptr, v_ptr, tails_ptr, sinks_ptr, token_request_ptr, token_position_ptr, rows_ptr, sink_slot_ptr, length_ptr,
    num_tokens, tail_row_stride, tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride, sink_head_stride,
    KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, RING: tl.constexpr, SINK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the rotated rows of a chunk that its ring and sinks keep. Grid: (blocks of tokens, 2 kv heads)."""
    which = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token_ok = token < num_tokens
    request = tl.load(token_request_ptr + token, mask=token_ok, other=0)
    position = tl.load(token_position_ptr + token, mask=token_ok, other=0)
    length = tl.load(length_ptr + request, mask=token_ok, other=0)
    # older rows of the chunk would share ring places with newer ones
    ring_ok = token_ok & (position >= length - RING)
    token_ok = ring_ok | (token_ok & (position < SINK))
    channels = tl.arange(0, DP)
    source = (token.to(tl.int64) * KV_HEADS + kv_head) * D
    if which == 0:
        in_ptrs = k_ptr + source
    else:
        in_ptrs = v_ptr + source
    raw = tl.load(in_ptrs[:, None] + channels[None, :], mask=token_ok[:, None] & (channels < D)[None, :], other=0.0)
    store_rows(
        raw, token, ring_ok, token_ok, which, kv_head, tails_ptr, sinks_ptr, token_request_ptr, token_position_ptr,
        rows_ptr, sink_slot_ptr, tail_row_stride, tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride,
        sink_head_stride, D, RING, SINK,
    )  # fmt: skip
