"""Find the pages of requests in an engine's table of slots."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["row_words", "pages", "slots_stride", "out_stride"],
    do_not_specialize_on_alignment=["rows_ptr", "slots_ptr"],
)
def pages_kernel(
    rows_ptr, slots_ptr, out_ptr, row_words, pages, slots_stride, out_stride, G: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid: (blocks of pages, requests). slots: [rows, tokens]; out: [requests, pages]. Rows: row_words apart."""
    request = tl.program_id(1)
    page = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slots = slots_ptr + tl.load(rows_ptr + request * row_words).to(tl.int64) * slots_stride
    slot = tl.load(slots + page * G, mask=page < pages, other=0)
    tl.store(out_ptr + request * out_stride + page, (slot // G).to(tl.int32), mask=page < pages)
