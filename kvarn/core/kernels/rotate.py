"""Rotate the keys and values of a step and round them to the model dtype, into sinks and optionally the ring, too."""

import triton
import triton.language as tl

from kvarn.core.kernels.chain import allow_next, wait_for_previous
from kvarn.core.kernels.hadamard import hadamard, load_in_fours

# The largest number that is finite in fp16 and exact in bf16: rotated rows are clamped to it.
RAW_MAX = tl.constexpr(65280.0)


@triton.jit
def _rotate_by_matrix(
    in_ptrs, signs_ptr, token_ok, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """Load rows [BLOCK, DP] and multiply them by a +1/-1 matrix [D, D], of which CHUNK rows are held at a time."""
    channels = tl.arange(0, DP)
    channel_ok = channels < D
    y = tl.zeros((BLOCK, DP), tl.float32)
    for start in tl.static_range(0, DP, CHUNK):
        part = start + tl.arange(0, CHUNK)
        part_ok = part < D
        x = tl.load(in_ptrs[:, None] + part[None, :], mask=token_ok[:, None] & part_ok[None, :], other=0.0)
        signs = tl.load(
            signs_ptr + part[:, None] * D + channels[None, :], mask=part_ok[:, None] & channel_ok[None, :], other=0.0
        )
        y = tl.dot(x, signs, y)
    return y


@triton.jit(do_not_specialize=["num_tokens"])
def rotate_kernel(
    k_ptr, v_ptr, signs_ptr, k_out_ptr, v_out_ptr, tails_ptr, sinks_ptr,
    token_request_ptr, token_position_ptr, rows_ptr, sink_slot_ptr, length_ptr, num_tokens,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    tail_row_stride, tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride, sink_head_stride,
    KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, NORM: tl.constexpr,
    RING: tl.constexpr, SINK: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of tokens, 2 kv heads): keys, then values. Outputs are contiguous [tokens, kv heads, D].

    signs: [D, D] in the dtype of v, looked at where D is no power of two, and BLOCK is 16 then. STORE: rings get the
    newest rows.
    """
    which = tl.program_id(1) // KV_HEADS  # 0 for keys, 1 for values
    head = tl.program_id(1) % KV_HEADS
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token_ok = token < num_tokens
    if STORE or SINK > 0:
        # a step is described long before: its numbers are asked for before the rows are there
        request = tl.load(token_request_ptr + token, mask=token_ok, other=0)
        position = tl.load(token_position_ptr + token, mask=token_ok, other=0)
        ring_row, sink_slot = load_places(request, token_ok, rows_ptr, sink_slot_ptr, SINK)
        ring_ok = token_ok & STORE
        if STORE:
            ring_ok &= _kept_in_ring(request, position, token_ok, length_ptr, RING)
    wait_for_previous(CHAINED)
    allow_next(CHAINED)
    wide = token.to(tl.int64)
    channels = tl.arange(0, DP)
    mask = token_ok[:, None] & (channels < D)[None, :]
    if which == 0:
        in_ptrs = k_ptr + wide * k_token_stride + head * k_head_stride
        y = load_in_fours(in_ptrs[:, None], channels[None, :], mask, D)
        out_ptrs = k_out_ptr + (wide * KV_HEADS + head) * D
    else:
        in_ptrs = v_ptr + wide * v_token_stride + head * v_head_stride
        if D == DP:
            y = hadamard(tl.load(in_ptrs[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32)) * NORM
        else:
            y = _rotate_by_matrix(in_ptrs, signs_ptr, token_ok, D, DP, BLOCK, CHUNK) * NORM
        out_ptrs = v_out_ptr + (wide * KV_HEADS + head) * D
    raw = tl.minimum(tl.maximum(y, -RAW_MAX), RAW_MAX).to(k_out_ptr.dtype.element_ty)
    tl.store(out_ptrs[:, None] + channels[None, :], raw, mask=mask)
    if STORE or SINK > 0:
        store_rows(
            raw, position, ring_row, sink_slot, ring_ok, token_ok, which, head, tails_ptr, sinks_ptr, tail_row_stride,
            tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride, sink_head_stride, D, RING, SINK,
        )  # fmt: skip


@triton.jit
def _kept_in_ring(request, position, token_ok, length_ptr, RING: tl.constexpr):
    """Tell which rows a ring holds after the step: older ones of a chunk would share their places with newer ones."""
    return position >= tl.load(length_ptr + request, mask=token_ok, other=0) - RING


@triton.jit
def load_places(request, token_ok, rows_ptr, sink_slot_ptr, SINK: tl.constexpr):
    """Return the ring of each row's request, and its sink slot, -1 for none."""
    ring_row = tl.load(rows_ptr + request, mask=token_ok, other=0).to(tl.int64)
    if SINK > 0:
        sink_slot = tl.load(sink_slot_ptr + request, mask=token_ok, other=-1).to(tl.int64)
    else:
        sink_slot = 0 * ring_row - 1
    return ring_row, sink_slot


@triton.jit
def store_rows(
    raw, position, ring_row, sink_slot, ring_ok, token_ok, which, kv_head, tails_ptr, sinks_ptr, tail_row_stride,
    tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride, sink_head_stride, D: tl.constexpr,
    RING: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """Write rotated rows [tokens, DP] of one kv head to their requests' rings and, the first ones, to the sinks."""
    channels = tl.arange(0, raw.shape[1])
    channel_ok = channels < D
    ring = tails_ptr + ring_row * tail_row_stride + which * tail_kv_stride + kv_head * tail_head_stride
    ring += (position % RING) * D
    tl.store(ring[:, None] + channels[None, :], raw, mask=ring_ok[:, None] & channel_ok[None, :])
    if SINK > 0:
        sink_ok = token_ok & (sink_slot >= 0) & (position < SINK)
        sink = sinks_ptr + sink_slot * sink_slot_stride + which * sink_kv_stride + kv_head * sink_head_stride
        sink += position * D
        tl.store(sink[:, None] + channels[None, :], raw, mask=sink_ok[:, None] & channel_ok[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
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
    ring_ok = token_ok & _kept_in_ring(request, position, token_ok, length_ptr, RING)
    token_ok = ring_ok | (token_ok & (position < SINK))
    channels = tl.arange(0, DP)
    source = (token.to(tl.int64) * KV_HEADS + kv_head) * D
    if which == 0:
        in_ptrs = k_ptr + source
    else:
        in_ptrs = v_ptr + source
    raw = tl.load(in_ptrs[:, None] + channels[None, :], mask=token_ok[:, None] & (channels < D)[None, :], other=0.0)
    ring_row, sink_slot = load_places(request, token_ok, rows_ptr, sink_slot_ptr, SINK)
    store_rows(
        raw, position, ring_row, sink_slot, ring_ok, token_ok, which, kv_head, tails_ptr, sinks_ptr, tail_row_stride,
        tail_kv_stride, tail_head_stride, sink_slot_stride, sink_kv_stride, sink_head_stride, D, RING, SINK,
    )  # fmt: skip
