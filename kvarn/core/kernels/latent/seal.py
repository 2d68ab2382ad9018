"""Quantise one tile of latents into its record: round, plane-pack; copy or round the rope part."""

import triton
import triton.language as tl

from kvarn.core.kernels.address import find_record
from kvarn.core.kernels.chain import allow_next, wait_for_previous
from kvarn.core.kernels.seal import quantise


@triton.constexpr_function
def _fewest_words(fields):
    return min(field[3] for field in fields)


@triton.jit
def _tile_rows(ring, chunk, in_ring, channels, ROWS_IN_RING: tl.constexpr):
    """Load some channels of a tile's rows, float32, [G, *channels]. ring, chunk: addresses of rows, shaped alike."""
    x = tl.load(ring + channels, mask=in_ring, other=0.0)
    if not ROWS_IN_RING:
        x = tl.where(in_ring, x, tl.load(chunk + channels, mask=in_ring == 0, other=0.0))
    return x.to(tl.float32)


@triton.jit
def _store_words(
    codes, record, few, LOW_BIT: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, WORDS: tl.constexpr,
    EVERY: tl.constexpr,
):  # fmt: skip
    """Pack one field of codes, [G, channels // FEW, FEW], where word w of every EVERY is one of `few`."""
    G: tl.constexpr = codes.shape[0]
    FEW: tl.constexpr = codes.shape[2]
    PLANES: tl.constexpr = 16 // BITS
    part = (codes >> LOW_BIT) & ((1 << BITS) - 1)
    planes = tl.reshape(part, (G, PLANES, WORDS // EVERY, FEW))
    words = tl.sum(planes << (tl.arange(0, PLANES) * BITS)[None, :, None, None], axis=1)  # [G, WORDS // EVERY, FEW]
    word = tl.arange(0, WORDS // EVERY)[:, None] * EVERY + few[None, :]
    words_ptr = record.to(tl.pointer_type(tl.int16)) + OFFSET // 2 + tl.arange(0, G)[:, None, None] * WORDS
    tl.store(words_ptr + word[None, :, :], words.to(tl.int16))


@triton.jit
def _seal_channels(
    ring, chunk, in_ring, record, part, DIM: tl.constexpr, FIELDS: tl.constexpr, SCALES: tl.constexpr,
    BITS: tl.constexpr, CLIP: tl.constexpr, SCALE_MAX: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS_IN_RING: tl.constexpr,
):  # fmt: skip
    """Quantise the channels that share words with each other: part `part`, CHANNELS of them.

    Words of all fields repeat every _fewest_words channels, so a part holds the same few of every repetition.
    """
    EVERY: tl.constexpr = _fewest_words(FIELDS)
    REPEATS: tl.constexpr = DIM // EVERY
    FEW: tl.constexpr = CHANNELS // REPEATS
    few = part * FEW + tl.arange(0, FEW)
    channel = tl.arange(0, REPEATS)[:, None] * EVERY + few[None, :]
    x = _tile_rows(
        ring[:, None, None], chunk[:, None, None], in_ring[:, None, None], channel[None, :, :], ROWS_IN_RING
    )  # [G, REPEATS, FEW]
    codes, scale, offset = quantise(x, True, 0, BITS, CLIP, SCALE_MAX)
    halfs = record.to(tl.pointer_type(tl.float16))
    tl.store(halfs + SCALES[0] // 2 + channel[None, :, :], scale)
    tl.store(halfs + SCALES[1] // 2 + channel[None, :, :], offset)
    for f in tl.static_range(len(FIELDS)):
        _store_words(codes, record, few, FIELDS[f][1], FIELDS[f][0], FIELDS[f][2], FIELDS[f][3], EVERY)


@triton.jit
def _seal_tile(
    task, tile, tails_ptr, chunk_ptr, records_ptr, task_request_ptr, rows_ptr, prefix_ptr, length_ptr, query_start_ptr,
    block_table_ptr, record_block_stride, record_tile_stride, tail_row_stride, chunk_token_stride, block_table_stride,
    LATENT: tl.constexpr, ROPE: tl.constexpr, G: tl.constexpr, RING: tl.constexpr, TILES: tl.constexpr,
    FIELDS: tl.constexpr, SCALES: tl.constexpr, ROPE_START: tl.constexpr, ROPE_FIELDS: tl.constexpr,
    ROPE_SCALES: tl.constexpr, LATENT_BITS: tl.constexpr, ROPE_BITS: tl.constexpr, LATENT_CLIP: tl.constexpr,
    SCALE_MAX: tl.constexpr, ROWS_IN_RING: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write one part of a task's record: some channels of the latent or, the last part, the rope part."""
    part = tl.program_id(1)
    request = tl.load(task_request_ptr + task)
    prefix = tl.load(prefix_ptr + request)
    ring_end = tl.load(length_ptr + request) if ROWS_IN_RING else prefix
    position = tile * G + tl.arange(0, G)
    in_ring = position < ring_end
    ring = tails_ptr + tl.load(rows_ptr + request).to(tl.int64) * tail_row_stride
    ring += (position % RING) * (LATENT + ROPE)
    first = tl.load(query_start_ptr + request) - prefix
    chunk = chunk_ptr + (first + position).to(tl.int64) * chunk_token_stride
    page = tl.load(block_table_ptr + request.to(tl.int64) * block_table_stride + tile)
    record = find_record(records_ptr, page, 0, record_block_stride, record_tile_stride, 0, TILES)
    if part < LATENT // CHANNELS:
        _seal_channels(
            ring, chunk, in_ring, record, part, LATENT, FIELDS, SCALES, LATENT_BITS, LATENT_CLIP, SCALE_MAX, CHANNELS,
            ROWS_IN_RING,
        )  # fmt: skip
    else:
        if len(ROPE_FIELDS) == 0:
            channels = tl.arange(0, ROPE)[None, :]
            rope = _tile_rows(ring[:, None] + LATENT, chunk[:, None] + LATENT, in_ring[:, None], channels, ROWS_IN_RING)
            halfs = record.to(tl.pointer_type(tl.float16)) + ROPE_START // 2
            tl.store(halfs + tl.arange(0, G)[:, None] * ROPE + channels, rope.to(tl.float16))
        else:
            _seal_channels(
                ring + LATENT, chunk + LATENT, in_ring, record, 0, ROPE, ROPE_FIELDS, ROPE_SCALES, ROPE_BITS, 1.0,
                SCALE_MAX, ROPE, ROWS_IN_RING,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tasks", "block_table_stride"])
def seal_latents_kernel(
    tails_ptr, chunk_ptr, records_ptr, task_request_ptr, task_tile_ptr, rows_ptr, prefix_ptr, length_ptr,
    query_start_ptr, block_table_ptr, tasks, record_block_stride, record_tile_stride, tail_row_stride,
    chunk_token_stride, block_table_stride, LATENT: tl.constexpr, ROPE: tl.constexpr, G: tl.constexpr,
    RING: tl.constexpr, TILES: tl.constexpr, FIELDS: tl.constexpr, SCALES: tl.constexpr, ROPE_START: tl.constexpr,
    ROPE_FIELDS: tl.constexpr, ROPE_SCALES: tl.constexpr, LATENT_BITS: tl.constexpr, ROPE_BITS: tl.constexpr,
    LATENT_CLIP: tl.constexpr, SCALE_MAX: tl.constexpr, ROWS_IN_RING: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid: (programs, parts of a record). Program p seals tasks p, p + programs and so on, looking at BLOCK together.

    A task with tile -1 does nothing.
    """
    allow_next(CHAINED)
    wait_for_previous(CHAINED)
    programs = tl.num_programs(0)
    for start in tl.range(tl.program_id(0), tasks, programs * BLOCK, num_stages=1):
        task = start + tl.arange(0, BLOCK) * programs
        if tl.max(tl.load(task_tile_ptr + task, mask=task < tasks, other=-1), axis=0) >= 0:
            for one in tl.range(start, tl.minimum(start + programs * BLOCK, tasks), programs, num_stages=1):
                tile = tl.load(task_tile_ptr + one)
                if tile >= 0:
                    _seal_tile(
                        one, tile, tails_ptr, chunk_ptr, records_ptr, task_request_ptr, rows_ptr, prefix_ptr,
                        length_ptr, query_start_ptr, block_table_ptr, record_block_stride, record_tile_stride,
                        tail_row_stride, chunk_token_stride, block_table_stride, LATENT, ROPE, G, RING, TILES, FIELDS,
                        SCALES, ROPE_START, ROPE_FIELDS, ROPE_SCALES, LATENT_BITS, ROPE_BITS, LATENT_CLIP, SCALE_MAX,
                        ROWS_IN_RING, CHANNELS,
                    )  # fmt: skip
