"""Quantise one tile of one head into its record: round, plane-pack."""

import triton
import triton.language as tl

from kvarn.core.kernels.address import find_record
from kvarn.core.kernels.chain import allow_next, wait_for_previous

_SCALE_MIN = tl.constexpr(1e-7)
_FP16_MAX = tl.constexpr(65504.0)
_LENGTH_STEPS = tl.constexpr(1023.0)


@triton.jit
def _rounded_bits(x):
    """Round to the nearest integer, ties to even as torch.round does. Return int32 whose low 22 bits are its own.

    Adding 1.5 * 2**23 leaves a float no bits for a fraction; taken as bits it costs no conversion.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def quantise(x, ok, AXIS: tl.constexpr, BITS: tl.constexpr, CLIP: tl.constexpr, SCALE_MAX: tl.constexpr):
    """Quantise along an axis. Return int32 codes, and the fp16 scale and offset, which keep the axis as one of one."""
    low = tl.min(tl.where(ok, x, float("inf")), axis=AXIS, keep_dims=True)
    high = tl.max(tl.where(ok, x, float("-inf")), axis=AXIS, keep_dims=True)
    levels: tl.constexpr = (1 << BITS) - 1
    middle = (low + high) * 0.5
    reach = (high - low) * (0.5 * CLIP)
    scale = tl.minimum(tl.maximum(2.0 * reach / levels, _SCALE_MIN), SCALE_MAX).to(tl.float16)
    reach = tl.minimum(reach, SCALE_MAX * levels * 0.5)
    offset = tl.minimum(tl.maximum(middle - reach, -_FP16_MAX), _FP16_MAX).to(tl.float16)
    share = (x - offset.to(tl.float32)) * (1.0 / (scale.to(tl.float32) * levels))
    return _rounded_bits(tl.minimum(tl.maximum(share, 0.0), 1.0) * levels) & levels, scale, offset


@triton.jit
def _quantise_values(x, ok, BITS: tl.constexpr, CLIP: tl.constexpr, SCALE_MAX: tl.constexpr):
    """Quantise rows of values, [G, DP], keeping their length. Return int32 codes, fp16 scale and offset, [G, 1]."""
    low = tl.min(tl.where(ok, x, float("inf")), axis=1, keep_dims=True)
    high = tl.max(tl.where(ok, x, float("-inf")), axis=1, keep_dims=True)
    levels: tl.constexpr = (1 << BITS) - 1
    middle = (low + high) * 0.5
    half = tl.maximum((high - low) * 0.5, _SCALE_MIN * levels / (2.0 * CLIP))
    # a channel that isn't there counts as the middle: it adds nothing to the sums
    y = tl.where(ok, x - middle, 0.0) * (1.0 / half)
    share = tl.minimum(tl.maximum(y * (0.5 / CLIP) + 0.5, 0.0), 1.0)
    codes = _rounded_bits(share * levels) & levels
    # moved by 1,024, eleven bits hold it, whatever NaN becomes
    length = (_rounded_bits(y * _LENGTH_STEPS + 1024.0) & 2047) - 1024
    squares = tl.sum(length * length, axis=1, keep_dims=True)
    along = tl.maximum(tl.sum(length * (2 * codes - levels), axis=1, keep_dims=True), 1)
    stretch = squares.to(tl.float32) / along.to(tl.float32)
    scale = tl.minimum(tl.maximum(stretch * half * (2.0 / _LENGTH_STEPS), _SCALE_MIN), SCALE_MAX).to(tl.float16)
    flat = high <= low  # such a row is its middle, exactly
    offset = tl.where(flat, middle, middle - scale.to(tl.float32) * (levels * 0.5))
    offset = tl.minimum(tl.maximum(offset, -_FP16_MAX), _FP16_MAX).to(tl.float16)
    return tl.where(flat, 0, codes), scale, offset


@triton.jit
def _store_key_words(
    codes, record, LOW_BIT: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, WORDS: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Pack [tokens, channels] codes into words [tokens, WORDS]; plane j of word c is channel j * WORDS + c."""
    G: tl.constexpr = codes.shape[0]
    PLANES: tl.constexpr = 16 // BITS
    part = (codes >> LOW_BIT) & ((1 << BITS) - 1)
    tokens = tl.arange(0, G)
    words_ptr = record.to(tl.pointer_type(tl.int16)) + OFFSET // 2
    if codes.shape[1] == D:
        planes = tl.reshape(part, (G, PLANES, WORDS))
        words = tl.sum(planes << (tl.arange(0, PLANES) * BITS)[None, :, None], axis=1)
        column = tl.arange(0, WORDS)
        tl.store(words_ptr + tokens[:, None] * WORDS + column[None, :], words.to(tl.int16))
    else:
        # channels that are no power of two: fetch every plane by index
        padded: tl.constexpr = codes.shape[1] // 2
        column = tl.arange(0, padded)
        words = tl.zeros((G, padded), tl.int32)
        for plane in tl.static_range(PLANES):
            index = tl.minimum(plane * WORDS + column, D - 1)
            words += tl.gather(part, tl.broadcast_to(index[None, :], (G, padded)), axis=1) << (plane * BITS)
        mask = (column < WORDS)[None, :]
        tl.store(words_ptr + tokens[:, None] * WORDS + column[None, :], words.to(tl.int16), mask=mask)


@triton.jit
def _store_value_words(
    codes, record, LOW_BIT: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, WORDS: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Pack [tokens, channels] codes into words [channels, WORDS]; plane j of word w is token j * WORDS + w."""
    DP: tl.constexpr = codes.shape[1]
    PLANES: tl.constexpr = 16 // BITS
    part = (codes >> LOW_BIT) & ((1 << BITS) - 1)
    planes = tl.reshape(part, (PLANES, WORDS, DP))
    words = tl.sum(planes << (tl.arange(0, PLANES) * BITS)[:, None, None], axis=0)  # [WORDS, DP]
    channels = tl.arange(0, DP)
    word_ptrs = record.to(tl.pointer_type(tl.int16)) + OFFSET // 2 + channels[None, :] * WORDS
    tl.store(word_ptrs + tl.arange(0, WORDS)[:, None], words.to(tl.int16), mask=(channels < D)[None, :])


@triton.jit
def _seal_tile(
    task, tile, tails_ptr, chunk_k_ptr, chunk_v_ptr, records_ptr, task_request_ptr, rows_ptr, prefix_ptr, length_ptr,
    query_start_ptr, block_table_ptr, record_block_stride, record_tile_stride, record_head_stride, tail_row_stride,
    tail_kv_stride, tail_head_stride, chunk_token_stride, chunk_head_stride, block_table_stride, D: tl.constexpr,
    DP: tl.constexpr, G: tl.constexpr, RING: tl.constexpr, TILES: tl.constexpr, K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr, OFFSETS: tl.constexpr, GROUP_TOKENS: tl.constexpr, KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr, KEY_CLIP: tl.constexpr, VALUE_CLIP: tl.constexpr, SCALE_MAX: tl.constexpr,
    ROWS_IN_RING: tl.constexpr,
):  # fmt: skip
    """Write the keys' or the values' part of the record of a task's tile."""
    head = tl.program_id(1)
    which = tl.program_id(2)
    request = tl.load(task_request_ptr + task)
    prefix = tl.load(prefix_ptr + request)
    ring_end = tl.load(length_ptr + request) if ROWS_IN_RING else prefix
    ring_row = tl.load(rows_ptr + request).to(tl.int64)
    position = tile * G + tl.arange(0, G)
    in_ring = position < ring_end
    channels = tl.arange(0, DP)
    channel_ok = channels < D
    ring = tails_ptr + ring_row * tail_row_stride + which * tail_kv_stride + head * tail_head_stride
    ring_ptrs = ring + (position % RING) * D
    x = tl.load(ring_ptrs[:, None] + channels[None, :], mask=in_ring[:, None] & channel_ok[None, :], other=0.0)
    if not ROWS_IN_RING:
        first = tl.load(query_start_ptr + request) - prefix
        offset = (first + position).to(tl.int64) * chunk_token_stride + head * chunk_head_stride
        if which == 0:
            chunk_ptrs = chunk_k_ptr + offset
        else:
            chunk_ptrs = chunk_v_ptr + offset
        chunk_mask = (position >= ring_end)[:, None] & channel_ok[None, :]
        fresh = tl.load(chunk_ptrs[:, None] + channels[None, :], mask=chunk_mask, other=0.0)
        x = tl.where(in_ring[:, None], x, fresh)
    x = x.to(tl.float32)  # [G, DP]
    page = tl.load(block_table_ptr + request.to(tl.int64) * block_table_stride + tile)
    record = find_record(
        records_ptr, page, head, record_block_stride, record_tile_stride, record_head_stride, TILES
    )  # fmt: skip
    halfs = record.to(tl.pointer_type(tl.float16))
    if which == 0:
        GROUPS: tl.constexpr = G // GROUP_TOKENS
        grouped = tl.reshape(x, (GROUPS, GROUP_TOKENS, DP))
        k_codes, k_scale, k_offset = quantise(grouped, channel_ok[None, None, :], 1, KEY_BITS, KEY_CLIP, SCALE_MAX)
        k_codes = tl.reshape(k_codes, (G, DP))
        for f in tl.static_range(len(K_FIELDS)):
            _store_key_words(k_codes, record, K_FIELDS[f][1], K_FIELDS[f][0], K_FIELDS[f][2], K_FIELDS[f][3], D)
        channel_at = tl.arange(0, GROUPS)[:, None, None] * D + channels[None, None, :]
        tl.store(halfs + OFFSETS[0] // 2 + channel_at, k_scale, mask=channel_ok[None, None, :])
        tl.store(halfs + OFFSETS[1] // 2 + channel_at, k_offset, mask=channel_ok[None, None, :])
    else:
        v_codes, v_scale, v_offset = _quantise_values(x, channel_ok[None, :], VALUE_BITS, VALUE_CLIP, SCALE_MAX)
        for f in tl.static_range(len(V_FIELDS)):
            _store_value_words(v_codes, record, V_FIELDS[f][1], V_FIELDS[f][0], V_FIELDS[f][2], V_FIELDS[f][3], D)
        token_at = tl.arange(0, G)[:, None]
        tl.store(halfs + OFFSETS[2] // 2 + token_at, v_scale)
        tl.store(halfs + OFFSETS[3] // 2 + token_at, v_offset)


@triton.jit
def seal_tasks(
    tails_ptr, chunk_k_ptr, chunk_v_ptr, records_ptr, task_request_ptr, task_tile_ptr, rows_ptr, prefix_ptr,
    length_ptr, query_start_ptr, block_table_ptr, tasks, record_block_stride, record_tile_stride, record_head_stride,
    tail_row_stride, tail_kv_stride, tail_head_stride, chunk_token_stride, chunk_head_stride, block_table_stride,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, RING: tl.constexpr, TILES: tl.constexpr,
    K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr, OFFSETS: tl.constexpr, GROUP_TOKENS: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_CLIP: tl.constexpr, VALUE_CLIP: tl.constexpr,
    SCALE_MAX: tl.constexpr, ROWS_IN_RING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Seal tasks p, p + programs and so on, as program p of `seal_kernel`."""
    first = tl.program_id(0)
    programs = tl.num_programs(0)
    for start in tl.range(first, tasks, programs * BLOCK, num_stages=1):
        task = start + tl.arange(0, BLOCK) * programs
        if tl.max(tl.load(task_tile_ptr + task, mask=task < tasks, other=-1), axis=0) >= 0:
            for one in tl.range(start, tl.minimum(start + programs * BLOCK, tasks), programs, num_stages=1):
                tile = tl.load(task_tile_ptr + one)
                if tile >= 0:
                    _seal_tile(
                        one, tile, tails_ptr, chunk_k_ptr, chunk_v_ptr, records_ptr, task_request_ptr, rows_ptr,
                        prefix_ptr, length_ptr, query_start_ptr, block_table_ptr, record_block_stride,
                        record_tile_stride, record_head_stride, tail_row_stride, tail_kv_stride, tail_head_stride,
                        chunk_token_stride, chunk_head_stride, block_table_stride, D, DP, G, RING, TILES, K_FIELDS,
                        V_FIELDS, OFFSETS, GROUP_TOKENS, KEY_BITS, VALUE_BITS, KEY_CLIP, VALUE_CLIP, SCALE_MAX,
                        ROWS_IN_RING,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["tasks", "block_table_stride"])
def seal_kernel(
    tails_ptr, chunk_k_ptr, chunk_v_ptr, records_ptr, task_request_ptr, task_tile_ptr, rows_ptr, prefix_ptr,
    length_ptr, query_start_ptr, block_table_ptr, tasks, record_block_stride, record_tile_stride, record_head_stride,
    tail_row_stride, tail_kv_stride, tail_head_stride, chunk_token_stride, chunk_head_stride, block_table_stride,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, RING: tl.constexpr, TILES: tl.constexpr,
    K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr, OFFSETS: tl.constexpr, GROUP_TOKENS: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_CLIP: tl.constexpr, VALUE_CLIP: tl.constexpr,
    SCALE_MAX: tl.constexpr, ROWS_IN_RING: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid: (programs, kv_heads, 2); the last axis is keys, values. Program p seals tasks p, p + programs and so on.

    A task with tile -1 does nothing. In a decode step most have none: programs are few then, and look at BLOCK tasks
    together.
    """
    allow_next(CHAINED)
    wait_for_previous(CHAINED)
    seal_tasks(
        tails_ptr, chunk_k_ptr, chunk_v_ptr, records_ptr, task_request_ptr, task_tile_ptr, rows_ptr, prefix_ptr,
        length_ptr, query_start_ptr, block_table_ptr, tasks, record_block_stride, record_tile_stride,
        record_head_stride, tail_row_stride, tail_kv_stride, tail_head_stride, chunk_token_stride, chunk_head_stride,
        block_table_stride, D, DP, G, RING, TILES, K_FIELDS, V_FIELDS, OFFSETS, GROUP_TOKENS, KEY_BITS, VALUE_BITS,
        KEY_CLIP, VALUE_CLIP, SCALE_MAX, ROWS_IN_RING, BLOCK,
    )  # fmt: skip
