"""Restore cached rows to the model's basis and dtype: unpack, dequantise, rotate back. Copy own rows."""

import triton
import triton.language as tl

from kvarn.core.kernels.address import find_record
from kvarn.core.kernels.read_rule import record_end

_FP16_MAX = tl.constexpr(65504.0)


@triton.jit
def _field(record, row, lane, ok, BITS: tl.constexpr, LOW_BIT: tl.constexpr, OFFSET: tl.constexpr, WORDS: tl.constexpr):
    """Load one field's part of codes, int32. row, lane: of each code; plane j of word w is lane j * words + w."""
    words = record.to(tl.pointer_type(tl.int16)) + OFFSET // 2 + row * WORDS
    word = tl.load(words + lane % WORDS, mask=ok, other=0).to(tl.int32)
    return ((word >> (lane // WORDS * BITS)) & ((1 << BITS) - 1)) << LOW_BIT


@triton.jit
def _codes(record, row, lane, ok, FIELDS: tl.constexpr):
    """Load codes, float32."""
    codes = _field(record, row, lane, ok, FIELDS[0][0], FIELDS[0][1], FIELDS[0][2], FIELDS[0][3])
    if len(FIELDS) == 2:
        codes += _field(record, row, lane, ok, FIELDS[1][0], FIELDS[1][1], FIELDS[1][2], FIELDS[1][3])
    return codes.to(tl.float32)


@triton.jit
def _stored_rows(
    record, ring, sinks, from_record, position, token, row_ok, channel, channel_ok, sink_tokens, KEYS: tl.constexpr,
    D: tl.constexpr, RING: tl.constexpr, FIELDS: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Load rows as they are stored, rotated, [tokens, channels], float32. token: of the tile; one group of keys."""
    ok = row_ok[:, None] & channel_ok[None, :]
    if from_record:
        halfs = record.to(tl.pointer_type(tl.float16))
        if KEYS:
            codes = _codes(record, token[:, None], channel[None, :], ok, FIELDS)
            at = tl.min(token, axis=0) // token.shape[0] * D + channel
            scale = tl.load(halfs + SCALE // 2 + at, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
            offset = tl.load(halfs + OFFSET // 2 + at, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
        else:
            codes = _codes(record, channel[None, :], token[:, None], ok, FIELDS)
            scale = tl.load(halfs + SCALE // 2 + token).to(tl.float32)[:, None]
            offset = tl.load(halfs + OFFSET // 2 + token).to(tl.float32)[:, None]
        exact = (position < sink_tokens)[:, None]
        raw = tl.load(sinks + position[:, None] * D + channel[None, :], mask=exact & ok, other=0.0)
        x = tl.where(exact, raw.to(tl.float32), codes * scale + offset)
    else:
        x = tl.load(ring + (position % RING)[:, None] * D + channel[None, :], mask=ok, other=0.0).to(tl.float32)
    return x


@triton.jit
def _restore_keys(
    out_ptr, out_row, record, ring, sinks, from_record, position, token, row_ok, sink_tokens, D: tl.constexpr,
    QP: tl.constexpr, RING: tl.constexpr, FIELDS: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Restore keys: four channels that were rotated together stand a quarter of a row apart."""
    quarter = tl.arange(0, QP)
    ok = quarter < D // 4
    first = _stored_rows(record, ring, sinks, from_record, position, token, row_ok, quarter, ok, sink_tokens, True,
                         D, RING, FIELDS, SCALE, OFFSET)  # fmt: skip
    second = _stored_rows(record, ring, sinks, from_record, position, token, row_ok, D // 4 + quarter, ok, sink_tokens,
                          True, D, RING, FIELDS, SCALE, OFFSET)  # fmt: skip
    third = _stored_rows(record, ring, sinks, from_record, position, token, row_ok, D // 2 + quarter, ok, sink_tokens,
                         True, D, RING, FIELDS, SCALE, OFFSET)  # fmt: skip
    fourth = _stored_rows(record, ring, sinks, from_record, position, token, row_ok, D // 4 * 3 + quarter, ok,
                          sink_tokens, True, D, RING, FIELDS, SCALE, OFFSET)  # fmt: skip
    out = out_ptr + out_row[:, None] + quarter[None, :]
    mask = row_ok[:, None] & ok[None, :]
    dtype = out_ptr.dtype.element_ty
    tl.store(out, ((first + second + third + fourth) * 0.5).to(dtype), mask=mask)
    tl.store(out + D // 4, ((first - second + third - fourth) * 0.5).to(dtype), mask=mask)
    tl.store(out + D // 2, ((first + second - third - fourth) * 0.5).to(dtype), mask=mask)
    tl.store(out + D // 4 * 3, ((first - second - third + fourth) * 0.5).to(dtype), mask=mask)


@triton.jit
def _restore_values(
    out_ptr, signs_ptr, out_row, record, ring, sinks, from_record, position, token, row_ok, sink_tokens,
    D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr, NORM: tl.constexpr, RING: tl.constexpr,
    FIELDS: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Restore values, by a matrix of which CHUNK rows are held at a time."""
    channels = tl.arange(0, DP)
    y = tl.zeros((token.shape[0], DP), tl.float32)
    for start in tl.static_range(0, DP, CHUNK):
        part = start + tl.arange(0, CHUNK)
        x = _stored_rows(record, ring, sinks, from_record, position, token, row_ok, part, part < D, sink_tokens, False,
                         D, RING, FIELDS, SCALE, OFFSET)  # fmt: skip
        mask = (part < D)[:, None] & (channels < D)[None, :]
        signs = tl.load(signs_ptr + part[:, None] * D + channels[None, :], mask=mask, other=0.0)
        y = tl.dot(tl.minimum(tl.maximum(x, -_FP16_MAX), _FP16_MAX).to(tl.float16), signs, y)
    out_ptrs = out_ptr + out_row[:, None] + channels[None, :]
    tl.store(out_ptrs, (y * NORM).to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & (channels < D)[None, :])


@triton.jit
def _copy(out_ptr, in_ptr, out_row, in_row, ok, D: tl.constexpr, DP: tl.constexpr):
    """Copy rows of D channels that start so many elements behind the pointers."""
    channel = tl.arange(0, DP)[None, :]
    mask = ok[:, None] & (channel < D)
    x = tl.load(in_ptr + in_row[:, None] + channel, mask=mask, other=0.0)
    tl.store(out_ptr + out_row[:, None] + channel, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_request", "block_table_stride"])
def restore_kernel(
    records_ptr, tails_ptr, sinks_ptr, signs_ptr, k_ptr, v_ptr, k_out_ptr, v_out_ptr, rows_ptr, block_table_ptr,
    prefix_ptr, own_start_ptr, query_start_ptr, sink_slot_ptr, begin_ptr, key_start_ptr, first_request,
    record_block_stride, record_tile_stride, record_head_stride, tail_row_stride, tail_kv_stride, tail_head_stride,
    sink_slot_stride, sink_kv_stride, sink_head_stride, block_table_stride, k_token_stride, k_head_stride,
    v_token_stride, v_head_stride,
    KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, QP: tl.constexpr, CHUNK: tl.constexpr, G: tl.constexpr,
    NORM: tl.constexpr, RING: tl.constexpr, TILES: tl.constexpr, TAIL: tl.constexpr, SINK: tl.constexpr,
    K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr, OFFSETS: tl.constexpr, GROUP_TOKENS: tl.constexpr,
):  # fmt: skip
    """One program restores keys or values of GROUP_TOKENS tokens. Grid: (groups, requests, 2 kv heads): keys, values.

    From a request's committed length on, it copies the step's own rows. Outputs are [keys, KV_HEADS, D].
    signs: [D, D], fp16, already transposed for the way back of values.
    """
    head = tl.program_id(2) % KV_HEADS
    which = tl.program_id(2) // KV_HEADS
    place = tl.program_id(1)
    index = tl.arange(0, GROUP_TOKENS)
    done = tl.program_id(0) * GROUP_TOKENS
    out_begin = tl.load(key_start_ptr + place)
    left = tl.load(key_start_ptr + place + 1) - out_begin - done
    if left <= 0:
        return
    request = first_request + place
    start = tl.load(begin_ptr + place) + done
    position = start + index
    token = start % G + index
    prefix = tl.load(prefix_ptr + request)
    out_row = ((out_begin + done + index).to(tl.int64) * KV_HEADS + head) * D
    if start + GROUP_TOKENS > prefix:
        own_row = (tl.load(query_start_ptr + request) + position - prefix).to(tl.int64)
        own_ok = (index < left) & (position >= prefix)
        if which == 0:
            _copy(k_out_ptr, k_ptr, out_row, own_row * k_token_stride + head * k_head_stride, own_ok, D, DP)
        else:
            _copy(v_out_ptr, v_ptr, out_row, own_row * v_token_stride + head * v_head_stride, own_ok, D, DP)
        if start >= prefix:
            return
    row_ok = (index < left) & (position < prefix)
    stop = record_end(prefix, prefix, tl.load(own_start_ptr + request), TAIL, G)
    page = tl.load(block_table_ptr + request.to(tl.int64) * block_table_stride + start // G)
    record = find_record(
        records_ptr, page, head, record_block_stride, record_tile_stride, record_head_stride, TILES
    )  # fmt: skip
    ring_row = tl.load(rows_ptr + request).to(tl.int64)
    ring = tails_ptr + ring_row * tail_row_stride + which * tail_kv_stride + head * tail_head_stride
    slot = tl.load(sink_slot_ptr + request).to(tl.int64)
    sinks = sinks_ptr + slot * sink_slot_stride + which * sink_kv_stride + head * sink_head_stride
    sink_tokens = tl.where(slot >= 0, SINK, 0)
    if which == 0:
        _restore_keys(
            k_out_ptr, out_row, record, ring, sinks, start < stop, position, token, row_ok, sink_tokens, D, QP, RING,
            K_FIELDS, OFFSETS[0], OFFSETS[1],
        )  # fmt: skip
    else:
        _restore_values(
            v_out_ptr, signs_ptr, out_row, record, ring, sinks, start < stop, position, token, row_ok, sink_tokens, D,
            DP, CHUNK, NORM, RING, V_FIELDS, OFFSETS[2], OFFSETS[3],
        )  # fmt: skip
