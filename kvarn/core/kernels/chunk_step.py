"""Describe a step of chunks in one launch: ring ownership, page writers, sink slots, rows, full tiles and tasks."""

import triton
import triton.language as tl

from kvarn.core.kernels.ring import continues
from kvarn.core.kernels.sinks import move_sink_slots
from kvarn.core.kernels.work import crossing, units_of


@triton.jit
def _owner_of(at, starts_ptr, requests, search_steps):
    """Find whose these places of a ragged row are: request (as many as there are past the end) and index inside."""
    low = at * 0
    high = low + requests
    for _ in range(search_steps):
        middle = (low + high) // 2
        searching = low < high
        beyond = tl.load(starts_ptr + middle + 1, mask=searching, other=0) > at
        high = tl.where(searching & beyond, middle, high)
        low = tl.where(searching & ~beyond, middle + 1, low)
    return low, at - tl.load(starts_ptr + low)


@triton.jit
def _begin(
    request, ok, row, prefix, length, tags_ptr, table_ptr, ring_end_ptr, ring_page_ptr, sure_end_ptr, sure_page_ptr,
    own_start_ptr, owner_ptr, page_writer_ptr, out_ptr, table_stride, out_stride, G: tl.constexpr,
    PADDING_PAGES: tl.constexpr, DRAFTS: tl.constexpr, TAGGED: tl.constexpr,
):  # fmt: skip
    """Let requests continue their rings or take them over, and return how many lost their open tile."""
    table = table_ptr + request.to(tl.int64) * table_stride
    last_page = tl.load(table + tl.maximum(prefix - 1, 0) // G, mask=ok, other=0)
    continued = continues(
        row, prefix, last_page, ok, ring_end_ptr, ring_page_ptr, sure_end_ptr, sure_page_ptr, page_writer_ptr, G,
        DRAFTS,
    )  # fmt: skip
    if TAGGED:
        owners = owner_ptr + 2 * row
        tags = tags_ptr + 2 * request
        for half in tl.static_range(2):
            tag = tl.load(tags + half, mask=ok, other=0)
            continued &= tl.load(owners + half, mask=ok, other=0) == tag
    own_start = tl.where(continued, tl.load(own_start_ptr + row, mask=ok, other=0), prefix)
    lost = tl.sum((ok & (last_page >= PADDING_PAGES) & (own_start % G != 0)).to(tl.int32), axis=0)
    # all of a block is read before any of it is written
    tl.debug_barrier()
    if TAGGED:
        for half in tl.static_range(2):
            tl.store(owners + half, tl.load(tags + half, mask=ok, other=0), mask=ok)
    tl.store(own_start_ptr + row, own_start, mask=ok)
    tl.store(ring_end_ptr + row, length, mask=ok)
    tl.store(ring_page_ptr + row, tl.load(table + tl.maximum(length - 1, 0) // G, mask=ok, other=0), mask=ok)
    sure_end = tl.maximum(tl.minimum(prefix + 1, length), length - DRAFTS)
    tl.store(sure_end_ptr + row, sure_end, mask=ok)
    tl.store(sure_page_ptr + row, tl.load(table + tl.maximum(sure_end - 1, 0) // G, mask=ok, other=0), mask=ok)
    out = out_ptr + request
    tl.store(out, row, mask=ok)
    tl.store(out + out_stride, prefix, mask=ok)
    tl.store(out + 2 * out_stride, length, mask=ok)
    tl.store(out + 3 * out_stride, own_start, mask=ok)
    tl.store(out + 4 * out_stride, continued.to(tl.int32), mask=ok)
    return lost


@triton.jit
def _lay_out(starts_ptr, request, ok, counts, done):
    """Note where each request's share of a ragged row ends, after so many places; return where the last does."""
    counts = tl.where(ok, counts, 0)
    tl.store(starts_ptr + request + 1, done + tl.cumsum(counts, axis=0), mask=ok)
    return done + tl.sum(counts, axis=0)


_UNSPECIALIZED = [
    "row_words", "prefix_words", "length_words", "requests", "tokens", "seals", "tasks", "search_steps", "most_short",
    "table_stride", "request_stride", "token_stride", "seal_stride", "task_stride",
]  # fmt: skip


@triton.jit(
    do_not_specialize=_UNSPECIALIZED,
    do_not_specialize_on_alignment=["rows_ptr", "prefix_ptr", "length_ptr", "tags_ptr", "table_ptr"],
)
def chunk_step_kernel(
    rows_ptr, prefix_ptr, length_ptr, tags_ptr, table_ptr, ring_end_ptr, ring_page_ptr, sure_end_ptr, sure_page_ptr,
    own_start_ptr, owner_ptr, page_writer_ptr, page_slot_ptr, free_slots_ptr, free_count_ptr, faults_ptr,
    by_request_ptr, by_token_ptr, by_seal_ptr, by_task_ptr, row_words, prefix_words, length_words, requests, tokens,
    seals, tasks, search_steps, most_short, table_stride, request_stride, token_stride, seal_stride, task_stride,
    G: tl.constexpr, PADDING_PAGES: tl.constexpr, SINKS: tl.constexpr, DRAFTS: tl.constexpr, TAGGED: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr, RAW_BLOCK: tl.constexpr, CANONICAL: tl.constexpr, SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program. A request of more than most_short rows has no tasks; the others' are of ROWS rows.

    Rows, prefixes and lengths stand so many words apart.

    by_request: row, prefix, length, own_start, whether it continues, sink slot; then, one longer, where its tokens,
    full tiles and tasks begin. by_token: request, position. by_seal: request, tile or -1. by_task: request or -1, first
    row, end of its work.
    """
    prefix_out, length_out = by_request_ptr + request_stride, by_request_ptr + 2 * request_stride
    own_out, slot_out = by_request_ptr + 3 * request_stride, by_request_ptr + 5 * request_stride
    token_starts, seal_starts = by_request_ptr + 6 * request_stride, by_request_ptr + 7 * request_stride
    task_starts = by_request_ptr + 8 * request_stride
    faults = tl.load(faults_ptr)
    tokens_done, seals_done, tasks_done = 0, 0, 0
    tl.store(token_starts, 0)
    tl.store(seal_starts, 0)
    tl.store(task_starts, 0)
    for start in range(0, requests, BLOCK):
        request = start + tl.arange(0, BLOCK)
        ok = request < requests
        row = tl.load(rows_ptr + request * row_words, mask=ok, other=0)
        prefix = tl.load(prefix_ptr + request * prefix_words, mask=ok, other=0)
        length = tl.load(length_ptr + request * length_words, mask=ok, other=0)
        faults += _begin(
            request, ok, row, prefix, length, tags_ptr, table_ptr, ring_end_ptr, ring_page_ptr, sure_end_ptr,
            sure_page_ptr, own_start_ptr, owner_ptr, page_writer_ptr, by_request_ptr, table_stride, request_stride, G,
            PADDING_PAGES, DRAFTS, TAGGED,
        )  # fmt: skip
        new = length - prefix
        tokens_done = _lay_out(token_starts, request, ok, new, tokens_done)
        seals_done = _lay_out(seal_starts, request, ok, length // G - prefix // G, seals_done)
        tasks_done = _lay_out(task_starts, request, ok, tl.where(new > most_short, 0, tl.cdiv(new, ROWS)), tasks_done)
    tl.store(faults_ptr, faults)
    # what follows reads what other threads wrote
    tl.debug_barrier()
    count = tl.load(free_count_ptr)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        ok = token < tokens
        owner, index = _owner_of(token, token_starts, requests, search_steps)
        index = tl.where(owner < requests, index, 0)
        owner = tl.where(owner < requests, owner, 0)
        position = tl.load(prefix_out + owner) + index
        tl.store(by_token_ptr + token, owner, mask=ok)
        tl.store(by_token_ptr + token_stride + token, position, mask=ok)
        page = tl.load(table_ptr + owner.to(tl.int64) * table_stride + position // G, mask=ok, other=0)
        tl.store(page_writer_ptr + page, tl.load(by_request_ptr + owner), mask=ok)
        if SINKS:
            starts = ok & (position % G == 0) & (page >= PADDING_PAGES)
            count = move_sink_slots(count, page_slot_ptr, free_slots_ptr, page, starts, position == 0)
    tl.store(free_count_ptr, count)
    for start in range(0, seals, BLOCK):
        seal = start + tl.arange(0, BLOCK)
        owner, index = _owner_of(seal, seal_starts, requests, search_steps)
        inside = owner < requests
        owner = tl.where(inside, owner, 0)
        tile = tl.where(inside, tl.load(prefix_out + owner) // G + index, -1)
        tl.store(by_seal_ptr + seal, owner, mask=seal < seals)
        tl.store(by_seal_ptr + seal_stride + seal, tile, mask=seal < seals)
    work_done = 0
    for start in range(0, tasks, BLOCK):
        task = start + tl.arange(0, BLOCK)
        owner, index = _owner_of(task, task_starts, requests, search_steps)
        inside = owner < requests
        first_row = tl.where(inside, index * ROWS, 0)
        tl.store(by_task_ptr + task, tl.where(inside, owner, -1), mask=task < tasks)
        tl.store(by_task_ptr + task_stride + task, first_row, mask=task < tasks)
        owner = tl.where(inside, owner, 0)
        prefix, length = tl.load(prefix_out + owner), tl.load(length_out + owner)
        last = prefix + tl.minimum(first_row + ROWS, length - prefix) - 1
        tiles, ring_units, chunk_units, _, _, _ = units_of(
            prefix + first_row, last, prefix, length, tl.load(own_out + owner), G, TAIL, RAW_BLOCK, False, CANONICAL
        )
        shares = tl.where(inside, tl.cdiv(tiles + ring_units + chunk_units, SHARE) + crossing(SHARE), 0)
        tl.store(by_task_ptr + 2 * task_stride + task, work_done + tl.cumsum(shares, axis=0), mask=task < tasks)
        work_done += tl.sum(shares, axis=0)
    for start in range(0, requests, BLOCK):
        request = start + tl.arange(0, BLOCK)
        ok = request < requests
        first_page = tl.load(table_ptr + request.to(tl.int64) * table_stride, mask=ok, other=0)
        tl.store(slot_out + request, tl.load(page_slot_ptr + first_page, mask=ok, other=-1), mask=ok)
