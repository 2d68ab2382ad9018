"""Describe a step that adds any number of tokens to every request: prefill, chunks, mixed batches."""

from typing import Any

import torch

from kvarn.core.cache import CacheConfig, runs_triton
from kvarn.core.explicit import VERIFY_COLUMNS
from kvarn.core.launch import launch
from kvarn.core.prefill_plan import PrefillPlan
from kvarn.core.step import Step, aligned_ints, int32_words, power_of_two, task_shape
from kvarn.core.tail import TailState
from kvarn.core.tile_by_tile import tile_by_tile
from kvarn.core.work import RAW_BLOCK, Tasks, count_work_reference, units_per_share

# Requests, tokens and tasks that the kernel handles at a time.
_BLOCK = 1024
_NO_LIMIT = (1 << 31) - 1


def chunk_task_shape(config: CacheConfig[Any], group: int, widest: int) -> tuple[int, int]:
    """Return the query rows and columns of an attention task, where requests have any number of rows."""
    if config.batch_invariant:
        return task_shape(config, group, 1, widest)
    columns = max(widest, power_of_two(group))
    return columns // group, columns


def chunk_step(
    state: TailState,
    rows: torch.Tensor,
    prefix_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    tags: torch.Tensor | None,
    block_table: torch.Tensor,
    group: int,
    num_tokens: int,
    plan: PrefillPlan | None = None,
    widest: int = VERIFY_COLUMNS,
    hits_inside: bool = True,
) -> tuple[Step, torch.Tensor]:
    """Describe a step that adds any number of tokens to every request: prefill, chunks, mixed batches.

    Args:
        state: ring owners and sinks.
        rows: [requests], int32 or int64.
        prefix_lens: [requests], the same; any value for a request that continues, a tile boundary for a new one.
        seq_lens: [requests], the same.
        tags: [requests, 2], int64, `owner_tags`; None if the engine names no requests here.
        block_table: [requests, pages], int32.
        group: query heads of one kv head.
        num_tokens: tokens of the step, the sum of seq_lens - prefix_lens.
        plan: `plan_prefill` of this step; without, long chunks are cut into attention tasks like any other rows.
        widest: query columns of a program, unless the group is larger.
        hits_inside: as of a Step.

    Returns:
        The step, and which requests continue their ring, [requests], bool.

    Determinism: bitwise. Graph-safe: no (the number of tasks follows from the number of tokens).
    """
    if not runs_triton(state.page_slot):
        return chunk_step_reference(
            state, rows, prefix_lens, seq_lens, tags, block_table, group, num_tokens, plan, widest, hits_inside
        )
    config, requests, device = state.config, rows.shape[0], rows.device
    rows_per_task, columns = chunk_task_shape(config, group, widest)
    short_tokens, short_requests = (num_tokens, requests) if plan is None else (plan.short_tokens, plan.short_requests)
    by_request, by_token = aligned_ints(9, requests + 1, device), aligned_ints(2, num_tokens, device)
    by_seal = aligned_ints(2, num_tokens // config.tile_tokens + requests, device)
    by_task = aligned_ints(3, short_tokens // rows_per_task + short_requests, device)
    most_short = _NO_LIMIT if plan is None else plan.most_short
    given = rows, prefix_lens, seq_lens
    _launch(state, given, tags, block_table, (by_request, by_token, by_seal, by_task), rows_per_task, most_short)
    ring_rows, prefixes, lengths, own_start, continued, sink_slots = by_request[:6, :requests].unbind()
    step = Step(
        rows=ring_rows, block_table=block_table, prefix_lens=prefixes, seq_lens=lengths, own_start=own_start,
        sink_slots=sink_slots, query_start=by_request[6], token_request=by_token[0], token_position=by_token[1],
        seal_request=by_seal[0], seal_tile=by_seal[1], task_request=by_task[0], task_row=by_task[1],
        work_end=by_task[2], rows_per_task=rows_per_task, columns=columns, rows_in_ring=False, plan=plan,
        hits_inside=hits_inside,
    )  # fmt: skip
    return tile_by_tile(step, config), continued.bool()


def _launch(
    state: TailState,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tags: torch.Tensor | None,
    block_table: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    rows_per_task: int,
    most_short: int,
) -> None:
    """Launch the kernel. given: rows, prefixes, lengths; out: its outputs by request, token, full tile and task."""
    from kvarn.core.kernels.chunk_step import chunk_step_kernel

    config, requests = state.config, given[0].shape[0]
    words, widths = zip(*map(int32_words, given), strict=True)
    launch(
        chunk_step_kernel, (1,),
        *words, state.owner if tags is None else tags, block_table, state.ring_end, state.ring_page, state.sure_end,
        state.sure_page, state.own_start, state.owner, state.page_writer, state.page_slot, state.free_slots,
        state.free_count, state.faults, *out, *widths, requests, *(x.shape[1] for x in out[1:]),
        requests.bit_length(), most_short, block_table.stride(0), *(x.stride(0) for x in out), G=config.tile_tokens,
        PADDING_PAGES=config.tiles_per_block, SINKS=config.sink_tokens > 0, DRAFTS=config.draft_tokens,
        TAGGED=tags is not None, ROWS=rows_per_task, TAIL=config.tail_tokens, RAW_BLOCK=RAW_BLOCK,
        CANONICAL=config.canonical, SHARE=units_per_share(config, rows_in_ring=False), BLOCK=_BLOCK,
    )  # fmt: skip


def chunk_step_reference(
    state: TailState,
    rows: torch.Tensor,
    prefix_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    tags: torch.Tensor | None,
    block_table: torch.Tensor,
    group: int,
    num_tokens: int,
    plan: PrefillPlan | None = None,
    widest: int = VERIFY_COLUMNS,
    hits_inside: bool = True,
) -> tuple[Step, torch.Tensor]:
    """Describe it by operations of torch."""
    rows, prefix_lens, seq_lens = rows.int(), prefix_lens.int(), seq_lens.int()
    tile_tokens, requests = state.config.tile_tokens, rows.shape[0]
    own_start, continued = state.begin(rows, prefix_lens, seq_lens, block_table, tags)
    query_lens = seq_lens - prefix_lens
    query_start = torch.nn.functional.pad(query_lens.cumsum(0), (1, 0)).to(torch.int32)
    token_request, token_index = _spread(query_lens, num_tokens)
    token_request = token_request.clamp_min(0)
    token_position = token_index + prefix_lens[token_request.long()]
    seal_request, seal_tile = _full_tiles(prefix_lens, seq_lens, tile_tokens, num_tokens // tile_tokens + requests)
    tasks = _chunk_tasks(state.config, query_start, prefix_lens, seq_lens, own_start, group, num_tokens, plan, widest)
    step = Step(
        rows=rows,
        block_table=block_table,
        prefix_lens=prefix_lens,
        seq_lens=seq_lens,
        own_start=own_start,
        sink_slots=_start_pages(state, rows, token_request, token_position, block_table),
        query_start=query_start,
        token_request=token_request,
        token_position=token_position,
        seal_request=seal_request,
        seal_tile=seal_tile,
        rows_in_ring=False,
        plan=plan,
        hits_inside=hits_inside,
        **tasks,
    )
    return tile_by_tile(step, state.config), continued


def _chunk_tasks(
    config: CacheConfig[Any],
    query_start: torch.Tensor,
    prefix_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    own_start: torch.Tensor,
    group: int,
    num_tokens: int,
    plan: PrefillPlan | None,
    widest: int,
) -> dict[str, Any]:
    """Cut the query rows of chunks that aren't long into tasks: the fields of a Step that say which there are."""
    rows, columns = chunk_task_shape(config, group, widest)
    query_lens, requests = query_start.diff(), query_start.shape[0] - 1
    if plan is not None:
        query_lens = torch.where(query_lens > plan.most_short, 0, query_lens)
        num_tokens, requests = plan.short_tokens, plan.short_requests
    request, index = _spread((query_lens + rows - 1) // rows, num_tokens // rows + requests)
    row = index * rows
    tasks = Tasks(request, row, rows, query_start, prefix_lens, seq_lens, own_start, rows_in_ring=False)
    return {
        "task_request": request,
        "task_row": row,
        "work_end": count_work_reference(config, tasks),
        "rows_per_task": rows,
        "columns": columns,
    }


def _start_pages(
    state: TailState,
    rows: torch.Tensor,
    token_request: torch.Tensor,
    token_position: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """Note the pages that a step writes, and return the sink slot of every request's first page, or -1."""
    request = token_request.long()
    page = block_table[request, token_position.long() // state.config.tile_tokens]
    state.note_writers(page, rows[request])
    state.update_sinks(token_position, page)
    return state.page_slot[block_table[:, 0].long()]


def _full_tiles(
    prefix_lens: torch.Tensor, seq_lens: torch.Tensor, tile_tokens: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out the tiles that become full in a step: request (0 past the end) and tile (-1 past the end), [capacity]."""
    full_before = prefix_lens // tile_tokens
    request, index = _spread(seq_lens // tile_tokens - full_before, capacity)
    inside, request = request >= 0, request.clamp_min(0)
    return request, torch.where(inside, full_before[request.long()] + index, -1)


def _spread(counts: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay ragged counts out in a row: owner (-1 past the end) and index inside the owner, [capacity], int32."""
    ends = counts.cumsum(0)
    at = torch.arange(capacity, device=counts.device)
    owner = torch.searchsorted(ends, at, right=True)
    inside = owner < counts.shape[0]
    owner = owner.clamp_max(counts.shape[0] - 1)
    index = at - (ends - counts)[owner]
    return torch.where(inside, owner, -1).to(torch.int32), torch.where(inside, index, 0).to(torch.int32)
