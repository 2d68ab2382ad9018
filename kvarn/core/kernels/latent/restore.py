"""Restore cached rows of latents to the model's basis and dtype, and copy the chunk's own rows behind them."""

import triton
import triton.language as tl

from kvarn.core.kernels.address import find_record
from kvarn.core.kernels.hadamard import hadamard
from kvarn.core.kernels.latent.restored import restored_channels, restored_rope
from kvarn.core.kernels.read_rule import record_end


@triton.jit(do_not_specialize=["first_request", "block_table_stride"])
def restore_latents_kernel(
    records_ptr, tails_ptr, sinks_ptr, latent_ptr, rope_ptr, raw_ptr, rows_ptr, block_table_ptr, prefix_ptr,
    own_start_ptr, query_start_ptr, sink_slot_ptr, begin_ptr, key_start_ptr, first_request, record_block_stride,
    record_tile_stride, tail_row_stride, sink_slot_stride, block_table_stride, latent_stride, rope_stride,
    LATENT: tl.constexpr, ROPE: tl.constexpr, G: tl.constexpr, FIELDS: tl.constexpr, SCALES: tl.constexpr,
    ROPE_START: tl.constexpr, ROPE_FIELDS: tl.constexpr, ROPE_SCALES: tl.constexpr, NORM: tl.constexpr,
    RING: tl.constexpr, TILES: tl.constexpr, TAIL: tl.constexpr, SINK: tl.constexpr, TOKENS: tl.constexpr,
    USE_ASM: tl.constexpr,
):  # fmt: skip
    """One program restores TOKENS tokens of a tile. Grid: (blocks of tokens, requests). raw: [keys, LATENT + ROPE].

    From a request's committed length on, it copies the step's own rows.
    """
    place = tl.program_id(1)
    index = tl.arange(0, TOKENS)
    done = tl.program_id(0) * TOKENS
    out_begin = tl.load(key_start_ptr + place)
    left = tl.load(key_start_ptr + place + 1) - out_begin - done
    if left <= 0:
        return
    ROW: tl.constexpr = LATENT + ROPE
    request = first_request + place
    start = tl.load(begin_ptr + place) + done
    position = (start + index)[:, None]
    channel, rope_channel = tl.arange(0, LATENT)[None, :], tl.arange(0, ROPE)[None, :]
    prefix = tl.load(prefix_ptr + request)
    raw = raw_ptr + (out_begin + done + index).to(tl.int64)[:, None] * ROW
    dtype = raw_ptr.dtype.element_ty
    if start + TOKENS > prefix:
        own_ok = (index < left)[:, None] & (position >= prefix)
        own_row = (tl.load(query_start_ptr + request) + position - prefix).to(tl.int64)
        latent = tl.load(latent_ptr + own_row * latent_stride + channel, mask=own_ok, other=0.0)
        rope = tl.load(rope_ptr + own_row * rope_stride + rope_channel, mask=own_ok, other=0.0)
        tl.store(raw + channel, latent.to(dtype), mask=own_ok)
        tl.store(raw + LATENT + rope_channel, rope.to(dtype), mask=own_ok)
        if start >= prefix:
            return
    ok = (index < left)[:, None] & (position < prefix)
    if start < record_end(prefix, prefix, tl.load(own_start_ptr + request), TAIL, G):
        page = tl.load(block_table_ptr + request.to(tl.int64) * block_table_stride + start // G)
        record = find_record(records_ptr, page, 0, record_block_stride, record_tile_stride, 0, TILES)
        token = start % G + index
        latent = restored_channels(record, token, LATENT, FIELDS, SCALES, USE_ASM).to(tl.float32)
        rope = restored_rope(record, token, ROPE, ROPE_START, ROPE_FIELDS, ROPE_SCALES, USE_ASM).to(tl.float32)
        slot = tl.load(sink_slot_ptr + request).to(tl.int64)
        exact = (position < SINK) & (slot >= 0)
        sinks = sinks_ptr + slot * sink_slot_stride + position * ROW
        latent = tl.where(exact, tl.load(sinks + channel, mask=exact, other=0.0).to(tl.float32), latent)
        rope = tl.where(exact, tl.load(sinks + LATENT + rope_channel, mask=exact, other=0.0).to(tl.float32), rope)
    else:
        ring = tails_ptr + tl.load(rows_ptr + request).to(tl.int64) * tail_row_stride + position % RING * ROW
        latent = tl.load(ring + channel, mask=ok, other=0.0).to(tl.float32)
        rope = tl.load(ring + LATENT + rope_channel, mask=ok, other=0.0).to(tl.float32)
    tl.store(raw + channel, (hadamard(latent) * NORM).to(dtype), mask=ok)
    tl.store(raw + LATENT + rope_channel, rope.to(dtype), mask=ok)
