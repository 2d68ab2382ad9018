"""Rotate latents: of a step's rows, into sinks and optionally the ring, too, and of its absorbed queries."""

import triton
import triton.language as tl

from kvarn.core.kernels.chain import allow_next, wait_for_previous
from kvarn.core.kernels.hadamard import hadamard
from kvarn.core.kernels.rotate import RAW_MAX, load_places, store_rows
from kvarn.core.kernels.task import query_unit


@triton.jit
def _clamped(x, dtype: tl.constexpr):
    return tl.minimum(tl.maximum(x, -RAW_MAX), RAW_MAX).to(dtype)


@triton.jit(do_not_specialize=["num_tokens"])
def rotate_latents_kernel(
    latent_ptr, rope_ptr, raw_ptr, tails_ptr, sinks_ptr, token_request_ptr, token_position_ptr, rows_ptr,
    sink_slot_ptr, num_tokens, latent_stride, rope_stride, tail_row_stride, sink_slot_stride,
    LATENT: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, RING: tl.constexpr, SINK: tl.constexpr,
    STORE: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of tokens). raw: [tokens, LATENT + ROPE], contiguous."""
    allow_next(CHAINED)
    ROW: tl.constexpr = LATENT + ROPE
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = token < num_tokens
    if STORE or SINK > 0:
        request = tl.load(token_request_ptr + token, mask=ok, other=0)
        position = tl.load(token_position_ptr + token, mask=ok, other=0)
        ring_row, sink_slot = load_places(request, ok, rows_ptr, sink_slot_ptr, SINK)
    wait_for_previous(CHAINED)
    wide = token.to(tl.int64)[:, None]
    channel, rope_channel = tl.arange(0, LATENT)[None, :], tl.arange(0, ROPE)[None, :]
    x = tl.load(latent_ptr + wide * latent_stride + channel, mask=ok[:, None], other=0.0).to(tl.float32)
    latent = _clamped(hadamard(x) * NORM, raw_ptr.dtype.element_ty)
    x = tl.load(rope_ptr + wide * rope_stride + rope_channel, mask=ok[:, None], other=0.0).to(tl.float32)
    rope = _clamped(x, raw_ptr.dtype.element_ty)
    tl.store(raw_ptr + wide * ROW + channel, latent, mask=ok[:, None])
    tl.store(raw_ptr + wide * ROW + LATENT + rope_channel, rope, mask=ok[:, None])
    if STORE or SINK > 0:
        ring_ok = ok & STORE
        store_rows(
            latent, position, ring_row, sink_slot, ring_ok, ok, 0, 0, tails_ptr, sinks_ptr, tail_row_stride, 0, 0,
            sink_slot_stride, 0, 0, ROW, RING, SINK,
        )  # fmt: skip
        store_rows(
            rope, position, ring_row, sink_slot, ring_ok, ok, 0, 0, tails_ptr + LATENT, sinks_ptr + LATENT,
            tail_row_stride, 0, 0, sink_slot_stride, 0, 0, ROW, RING, SINK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def rotate_queries_kernel(
    latent_ptr, rope_ptr, out_ptr, unit_ptr, rows, heads, latent_token_stride, latent_head_stride, rope_token_stride,
    rope_head_stride, LATENT: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows, each a head of a token). out: [rows, LATENT + ROPE], fp16; unit: [rows], float32."""
    allow_next(CHAINED)
    wait_for_previous(CHAINED)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = (row < rows)[:, None]
    token, head = (row // heads).to(tl.int64)[:, None], (row % heads)[:, None]
    channel, rope_channel = tl.arange(0, LATENT)[None, :], tl.arange(0, ROPE)[None, :]
    latent_ptrs = latent_ptr + token * latent_token_stride + head * latent_head_stride + channel
    latent = hadamard(tl.load(latent_ptrs, mask=ok, other=0.0).to(tl.float32)) * NORM
    rope_ptrs = rope_ptr + token * rope_token_stride + head * rope_head_stride + rope_channel
    rope = tl.load(rope_ptrs, mask=ok, other=0.0).to(tl.float32)
    unit = query_unit(tl.maximum(tl.max(tl.abs(latent), axis=1), tl.max(tl.abs(rope), axis=1)))
    out = out_ptr + row.to(tl.int64)[:, None] * (LATENT + ROPE)
    tl.store(out + channel, (latent / unit[:, None]).to(tl.float16), mask=ok)
    tl.store(out + LATENT + rope_channel, (rope / unit[:, None]).to(tl.float16), mask=ok)
    tl.store(unit_ptr + row, unit, mask=row < rows)
