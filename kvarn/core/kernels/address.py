"""Where a record stands in memory."""

import triton
import triton.language as tl


@triton.jit
def find_record(records_ptr, page, head, block_stride, tile_stride, head_stride, TILES: tl.constexpr):
    """Return the address of a page's record: tile page % TILES of block page // TILES."""
    wide = page.to(tl.int64)
    record = records_ptr + wide // TILES * block_stride + head * head_stride
    if TILES > 1:
        record += wide % TILES * tile_stride
    return record
