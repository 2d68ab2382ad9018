"""Quantise one tile of one head into its record: normalise, round, plane-pack."""

import triton
import triton.language as tl

from kvarn.core.kernels.address import find_record
from kvarn.core.kernels.chain import wait_for_previous

_STD_MIN = tl.constexpr(1e-3)
_STD_MAX = tl.constexpr(1e3)
_LOG_SCALE_MAX = tl.constexpr(10.0)
_SCALE_MIN = tl.constexpr(1e-10)
_FP16_MAX = tl.constexpr(65504.0)


@triton.jit
def _std(x, ok, count, AXIS: tl.constexpr):
    """Return the sample standard deviation along an axis, mean removed, kept as a dimension of one."""
    mean = tl.sum(x, axis=AXIS, keep_dims=True) / count
    centred = tl.where(ok, x - mean, 0.0)
    return tl.sqrt(tl.sum(centred * centred, axis=AXIS, keep_dims=True) / (count - 1))


@triton.jit
def _spread(std, ok, AXIS: tl.constexpr):
    """Return max / min of the standard deviations that count, [1, 1]."""
    high = tl.max(tl.where(ok, std, 0.0), axis=AXIS, keep_dims=True)
    low = tl.min(tl.where(ok, std, float("inf")), axis=AXIS, keep_dims=True)
    return high / tl.maximum(low, 1e-8)


@triton.jit
def _normalise(
    x, ok, ROW_AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ITERATIONS: tl.constexpr,
    LOG_SCALE_MIN: tl.constexpr, MARGIN: tl.constexpr,
):  # fmt: skip
    """Return the log scales (rows, columns) of the most even iterate, each with a dimension of one.

    The tile stays as stored, [tokens, channels]; ROW_AXIS says along which axis the *rows* of the oriented tile are
    counted: 1 for keys (rows are channels), 0 for values (rows are tokens). ROWS and COLS are the true counts.
    """
    COL_AXIS: tl.constexpr = 1 - ROW_AXIS
    row_ok = tl.max(ok.to(tl.int32), axis=COL_AXIS, keep_dims=True) > 0
    col_ok = tl.max(ok.to(tl.int32), axis=ROW_AXIS, keep_dims=True) > 0
    row_std = _std(x, ok, COLS, COL_AXIS)
    col_std = _std(x, ok, ROWS, ROW_AXIS)
    row = tl.zeros_like(row_std)
    col = tl.zeros_like(col_std)
    best_row, best_col = row, col
    best = _spread(row_std, row_ok, ROW_AXIS) + _spread(col_std, col_ok, COL_AXIS)
    for _ in range(ITERATIONS):
        std = tl.minimum(tl.maximum(col_std, _STD_MIN), _STD_MAX)
        col = tl.minimum(tl.maximum(col + tl.log(std), LOG_SCALE_MIN), _LOG_SCALE_MAX)
        std = _std(x * tl.exp(-row) * tl.exp(-col), ok, COLS, COL_AXIS)
        std = tl.minimum(tl.maximum(std, _STD_MIN), _STD_MAX)
        row = tl.minimum(tl.maximum(row + tl.log(std), LOG_SCALE_MIN), _LOG_SCALE_MAX)
        balanced = x * tl.exp(-row) * tl.exp(-col)
        row_std = _std(balanced, ok, COLS, COL_AXIS)
        col_std = _std(balanced, ok, ROWS, ROW_AXIS)
        score = _spread(row_std, row_ok, ROW_AXIS) + _spread(col_std, col_ok, COL_AXIS)
        better = score <= best * (1.0 - MARGIN)
        best_row = tl.where(better, row, best_row)
        best_col = tl.where(better, col, best_col)
        best = tl.where(better, score, best)
    return best_row, best_col


@triton.jit
def _no_zero(x):
    return tl.where(x == 0, 1.0, x)


@triton.jit
def _quantise(
    x, ok, ROW_AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BITS: tl.constexpr, CLIP: tl.constexpr,
    ITERATIONS: tl.constexpr, LOG_SCALE_MIN: tl.constexpr, MARGIN: tl.constexpr, SCALE_FREE: tl.constexpr,
):  # fmt: skip
    """Return codes [tokens, channels] and the fp16 vectors scale, offset (rows) and across (columns)."""
    COL_AXIS: tl.constexpr = 1 - ROW_AXIS
    sigma = tl.full((1, 1), 1.0, tl.float32)
    if SCALE_FREE:
        count: tl.constexpr = ROWS * COLS
        mean = tl.sum(tl.sum(x, axis=COL_AXIS, keep_dims=True), axis=ROW_AXIS, keep_dims=True) / count
        centred = tl.where(ok, x - mean, 0.0)
        square = tl.sum(tl.sum(centred * centred, axis=COL_AXIS, keep_dims=True), axis=ROW_AXIS, keep_dims=True)
        std = tl.sqrt(square / (count - 1))
        sigma = tl.where(std > 0, std, sigma)
    x = x / sigma
    _row, col = _normalise(x, ok, ROW_AXIS, ROWS, COLS, ITERATIONS, LOG_SCALE_MIN, MARGIN)
    x = x * sigma
    column = tl.exp(col)
    peak = tl.max(tl.max(tl.abs(x / column), axis=COL_AXIS, keep_dims=True), axis=ROW_AXIS, keep_dims=True)
    col_ok = tl.max(ok.to(tl.int32), axis=ROW_AXIS, keep_dims=True) > 0
    widest = tl.max(tl.where(col_ok, column, 0.0), axis=COL_AXIS, keep_dims=True)
    balance = tl.where(peak > 0, tl.sqrt(peak / widest), 1.0)
    across = tl.minimum(column * balance, _FP16_MAX).to(tl.float16)
    rows = x / _no_zero(across.to(tl.float32))
    low = tl.min(tl.where(ok, rows, float("inf")), axis=COL_AXIS, keep_dims=True)
    high = tl.max(tl.where(ok, rows, float("-inf")), axis=COL_AXIS, keep_dims=True)
    middle = (low + high) * 0.5
    reach = (high - low) * (0.5 * CLIP)
    levels: tl.constexpr = (1 << BITS) - 1
    scale = tl.minimum(tl.maximum(2.0 * reach / levels, _SCALE_MIN), _FP16_MAX).to(tl.float16)
    offset = tl.minimum(tl.maximum(middle - reach, -_FP16_MAX), _FP16_MAX).to(tl.float16)
    steps = (rows - offset.to(tl.float32)) / _no_zero(scale.to(tl.float32))
    codes = tl.minimum(tl.maximum(steps, 0.0), levels * 1.0)
    # adding and taking away 1.5 * 2**23 rounds to the nearest integer, ties to even, as torch.round does
    codes = (codes + 12582912.0) - 12582912.0
    return codes.to(tl.int32), scale, offset, across


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
    V_FIELDS: tl.constexpr, OFFSETS: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_CLIP: tl.constexpr, VALUE_CLIP: tl.constexpr, ITERATIONS: tl.constexpr, LOG_SCALE_MIN: tl.constexpr,
    MARGIN: tl.constexpr, SCALE_FREE: tl.constexpr, ROWS_IN_RING: tl.constexpr,
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
    ok = tl.broadcast_to(channel_ok[None, :], (G, DP))
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
    token_at = tl.arange(0, G)[:, None]
    channel_at = channels[None, :]
    row_mask = channel_ok[None, :]
    if which == 0:
        k_codes, k_scale, k_offset, k_token = _quantise(
            x, ok, 1, D, G, KEY_BITS, KEY_CLIP, ITERATIONS, LOG_SCALE_MIN, MARGIN, SCALE_FREE
        )
        for f in tl.static_range(len(K_FIELDS)):
            _store_key_words(k_codes, record, K_FIELDS[f][1], K_FIELDS[f][0], K_FIELDS[f][2], K_FIELDS[f][3], D)
        tl.store(halfs + OFFSETS[0] // 2 + channel_at, k_scale, mask=row_mask)
        tl.store(halfs + OFFSETS[1] // 2 + channel_at, k_offset, mask=row_mask)
        tl.store(halfs + OFFSETS[2] // 2 + token_at, k_token)
    else:
        v_codes, v_scale, v_offset, v_channel = _quantise(
            x, ok, 0, G, D, VALUE_BITS, VALUE_CLIP, ITERATIONS, LOG_SCALE_MIN, MARGIN, SCALE_FREE
        )
        for f in tl.static_range(len(V_FIELDS)):
            _store_value_words(v_codes, record, V_FIELDS[f][1], V_FIELDS[f][0], V_FIELDS[f][2], V_FIELDS[f][3], D)
        tl.store(halfs + OFFSETS[3] // 2 + token_at, v_scale)
        tl.store(halfs + OFFSETS[4] // 2 + token_at, v_offset)
        tl.store(halfs + OFFSETS[5] // 2 + channel_at, v_channel, mask=row_mask)


@triton.jit
def seal_kernel(
    tails_ptr, chunk_k_ptr, chunk_v_ptr, records_ptr, task_request_ptr, task_tile_ptr, rows_ptr, prefix_ptr,
    length_ptr, query_start_ptr, block_table_ptr, tasks, record_block_stride, record_tile_stride, record_head_stride,
    tail_row_stride, tail_kv_stride, tail_head_stride, chunk_token_stride, chunk_head_stride, block_table_stride,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, RING: tl.constexpr, TILES: tl.constexpr,
    K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr, OFFSETS: tl.constexpr, KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr, KEY_CLIP: tl.constexpr, VALUE_CLIP: tl.constexpr, ITERATIONS: tl.constexpr,
    LOG_SCALE_MIN: tl.constexpr, MARGIN: tl.constexpr, SCALE_FREE: tl.constexpr, ROWS_IN_RING: tl.constexpr,
    BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid: (programs, kv_heads, 2); the last axis is keys, values. Program p seals tasks p, p + programs and so on.

    A task with tile -1 does nothing. In a decode step most have none: programs are few then, and look at BLOCK tasks
    together.
    """
    wait_for_previous(CHAINED)
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
                        V_FIELDS, OFFSETS, KEY_BITS, VALUE_BITS, KEY_CLIP, VALUE_CLIP, ITERATIONS, LOG_SCALE_MIN,
                        MARGIN, SCALE_FREE, ROWS_IN_RING,
                    )  # fmt: skip
