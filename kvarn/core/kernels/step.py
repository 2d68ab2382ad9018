"""Describe a decode or verify step in one launch: ring ownership, page writers, sink slots and lengths."""

import triton
import triton.language as tl

from kvarn.core.kernels.ring import continues
from kvarn.core.kernels.sinks import move_sink_slots


@triton.jit(do_not_specialize=["requests", "rows_each", "tasks_each", "task_rows", "table_stride", "out_stride"])
def verify_step_kernel(
    rows_ptr, seq_lens_ptr, table_ptr, ring_end_ptr, ring_page_ptr, sure_end_ptr, sure_page_ptr, own_start_ptr,
    page_writer_ptr, page_slot_ptr, free_slots_ptr, free_count_ptr, faults_ptr, out_ptr, requests, rows_each,
    tasks_each, task_rows, table_stride, out_stride, G: tl.constexpr, PADDING_PAGES: tl.constexpr, SINKS: tl.constexpr,
    SEVERAL: tl.constexpr, DRAFTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program. rows_each tokens a request, SEVERAL if not one, in tasks_each tasks of task_rows.

    Rows of out: prefix, length, own_start, sink slot, tile to seal or -1, index; then zeros if not SEVERAL, else query
    start, request and position of every token, request and first row of every task; last, whether a tile is filled.
    """
    count = tl.load(free_count_ptr)
    faults = tl.load(faults_ptr)
    fills = 0
    for start in range(0, requests, BLOCK):
        request = start + tl.arange(0, BLOCK)
        ok = request < requests
        row = tl.load(rows_ptr + request, mask=ok, other=0)
        length = tl.maximum(tl.load(seq_lens_ptr + request, mask=ok, other=0), rows_each)
        prefix = length - rows_each
        table = table_ptr + request.to(tl.int64) * table_stride
        first_page = tl.load(table, mask=ok, other=0)
        last_page = tl.load(table + tl.maximum(prefix - 1, 0) // G, mask=ok, other=0)
        page = tl.load(table + prefix // G, mask=ok, other=0)
        end_page = page
        if SEVERAL:
            end_page = tl.load(table + (length - 1) // G, mask=ok, other=0)
        continued = continues(
            row, prefix, last_page, ok, ring_end_ptr, ring_page_ptr, sure_end_ptr, sure_page_ptr, page_writer_ptr, G,
            DRAFTS,
        )  # fmt: skip
        own_start = tl.where(continued, tl.load(own_start_ptr + row, mask=ok, other=0), prefix)
        faults += tl.sum((ok & (last_page >= PADDING_PAGES) & (own_start % G != 0)).to(tl.int32), axis=0)
        # all of a block is read before any of it is written
        tl.debug_barrier()
        tl.store(own_start_ptr + row, own_start, mask=ok)
        tl.store(ring_end_ptr + row, length, mask=ok)
        tl.store(ring_page_ptr + row, end_page, mask=ok)
        sure_end = tl.maximum(prefix + 1, length - DRAFTS)
        tl.store(sure_end_ptr + row, sure_end, mask=ok)
        tl.store(sure_page_ptr + row, tl.where((sure_end - 1) // G == prefix // G, page, end_page), mask=ok)
        tl.store(page_writer_ptr + page, row, mask=ok)
        tl.store(page_writer_ptr + end_page, row, mask=ok)
        if SINKS:
            # a request starts one page at most, which then holds its last row
            first = (length - 1) // G * G
            starts = ok & (first >= prefix) & (end_page >= PADDING_PAGES)
            count = move_sink_slots(count, page_slot_ptr, free_slots_ptr, end_page, starts, first == 0)
        out = out_ptr + request
        tl.store(out, prefix, mask=ok)
        tl.store(out + out_stride, length, mask=ok)
        tl.store(out + 2 * out_stride, own_start, mask=ok)
        tl.store(out + 3 * out_stride, tl.load(page_slot_ptr + first_page, mask=ok, other=-1), mask=ok)
        full = length // G > prefix // G
        fills = tl.maximum(fills, tl.max((ok & full).to(tl.int32), axis=0))
        tl.store(out + 4 * out_stride, tl.where(full, length // G - 1, -1), mask=ok)
        tl.store(out + 5 * out_stride, request, mask=request <= requests)
        if SEVERAL:
            tl.store(out + 6 * out_stride, request * rows_each, mask=request <= requests)
            for i in range(rows_each):
                token = out_ptr + request * rows_each + i
                tl.store(token + 7 * out_stride, request, mask=ok)
                tl.store(token + 8 * out_stride, prefix + i, mask=ok)
            for i in range(tasks_each):
                task = out_ptr + request * tasks_each + i
                tl.store(task + 9 * out_stride, request, mask=ok)
                tl.store(task + 10 * out_stride, 0 * request + i * task_rows, mask=ok)
        else:
            tl.store(out + 6 * out_stride, 0 * request, mask=ok)
    LAST: tl.constexpr = 11 if SEVERAL else 7
    tl.store(out_ptr + LAST * out_stride, fills)
    tl.store(out_ptr + 5 * out_stride + requests, requests)
    if SEVERAL:
        tl.store(out_ptr + 6 * out_stride + requests, requests * rows_each)
    tl.store(free_count_ptr, count)
    tl.store(faults_ptr, faults)
