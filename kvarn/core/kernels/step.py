"""Describe a decode step: ring ownership, page writers, sink slots and lengths of all requests in one launch."""

import triton
import triton.language as tl

from kvarn.core.kernels.sinks import move_sink_slots


@triton.jit(do_not_specialize=["requests"])
def decode_step_kernel(
    rows_ptr, seq_lens_ptr, table_ptr, ring_end_ptr, ring_page_ptr, own_start_ptr, page_writer_ptr, page_slot_ptr,
    free_slots_ptr, free_count_ptr, faults_ptr, out_ptr, requests, table_stride, out_stride,
    G: tl.constexpr, PADDING_PAGES: tl.constexpr, SINKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program. Rows of out: prefix, length, own_start, sink slot, tile to seal or -1, index, zeros."""
    count = tl.load(free_count_ptr)
    faults = tl.load(faults_ptr)
    for start in range(0, requests, BLOCK):
        request = start + tl.arange(0, BLOCK)
        ok = request < requests
        row = tl.load(rows_ptr + request, mask=ok, other=0)
        length = tl.maximum(tl.load(seq_lens_ptr + request, mask=ok, other=1), 1)
        prefix = length - 1
        table = table_ptr + request.to(tl.int64) * table_stride
        first_page = tl.load(table, mask=ok, other=0)
        last_page = tl.load(table + tl.maximum(prefix - 1, 0) // G, mask=ok, other=0)
        page = tl.load(table + prefix // G, mask=ok, other=0)
        continued = (tl.load(ring_end_ptr + row, mask=ok, other=-1) == prefix) & (prefix > 0)
        continued &= tl.load(ring_page_ptr + row, mask=ok, other=-1) == last_page
        continued &= tl.load(page_writer_ptr + last_page, mask=ok, other=-1) == row
        own_start = tl.where(continued, tl.load(own_start_ptr + row, mask=ok, other=0), prefix)
        faults += tl.sum((ok & (last_page >= PADDING_PAGES) & (own_start % G != 0)).to(tl.int32), axis=0)
        # all of a block is read before any of it is written
        tl.debug_barrier()
        tl.store(own_start_ptr + row, own_start, mask=ok)
        tl.store(ring_end_ptr + row, length, mask=ok)
        tl.store(ring_page_ptr + row, page, mask=ok)
        tl.store(page_writer_ptr + page, row, mask=ok)
        if SINKS:
            starts = ok & (prefix % G == 0) & (page >= PADDING_PAGES)
            count = move_sink_slots(count, page_slot_ptr, free_slots_ptr, page, starts, prefix == 0)
        out = out_ptr + request
        tl.store(out, prefix, mask=ok)
        tl.store(out + out_stride, length, mask=ok)
        tl.store(out + 2 * out_stride, own_start, mask=ok)
        tl.store(out + 3 * out_stride, tl.load(page_slot_ptr + first_page, mask=ok, other=-1), mask=ok)
        tl.store(out + 4 * out_stride, tl.where(length % G == 0, length // G - 1, -1), mask=ok)
        tl.store(out + 5 * out_stride, request, mask=request <= requests)
        tl.store(out + 6 * out_stride, 0 * request, mask=ok)
    tl.store(out_ptr + 5 * out_stride + requests, requests)
    tl.store(free_count_ptr, count)
    tl.store(faults_ptr, faults)
