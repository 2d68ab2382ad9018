"""Step: what one forward pass does, as device tensors that all layers share. Built without a host sync."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from kvarn.core import read_rule
from kvarn.core.cache import CacheConfig, runs_triton
from kvarn.core.explicit import DECODE_COLUMNS, VERIFY_COLUMNS, widest_columns
from kvarn.core.launch import launch
from kvarn.core.prefill_plan import PrefillPlan
from kvarn.core.tail import TailState
from kvarn.core.work import Tasks, count_work

# Requests that the kernel of a verify step handles at a time, and the fields of a Step that it writes first.
_STEP_BLOCK = 1024
_UNIFORM_FIELDS = ("prefix_lens", "seq_lens", "own_start", "sink_slots", "seal_tile")


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass over a batch. All tensors int32 on the device.

    Args:
        rows: [requests], rings of the requests.
        block_table: [requests, pages], physical pages in order; entries past the end are never followed.
        prefix_lens: [requests], tokens in the cache before the step: the committed length.
        seq_lens: [requests], tokens after the step.
        own_start: [requests], first position whose raw rows the request wrote itself.
        sink_slots: [requests], sink slot of the first page or -1.
        query_start: [requests + 1], first token of each request in this step's rows.
        token_request: [tokens], request of every token.
        token_position: [tokens], position of every token.
        seal_request: [seal tasks], request of a tile that becomes full.
        seal_tile: [seal tasks], its tile; -1 for none.
        task_request: [tasks], request whose query rows an attention task serves; -1 for none.
        task_row: [tasks], first query row of the task, counted inside the request.
        work_end: [tasks], units of attention's work up to and including each task's.
        rows_per_task: query rows of one task.
        columns: query columns of one program, padding included.
        rows_in_ring: this step's rows are stored before they are attended to, and then read there (decode and verify),
            or are read as they come (chunks, whose rows push out rows that their first queries still read).
        plan: long chunks, which have no attention tasks; None if there are none.
        hits_inside: a request may read pages that another fills in this step: the engine publishes them before.
        parts: what is done in its place, one after the other (`tile_by_tile`); none for the step itself.
        fills: [1], 0 if no request fills a tile, else 1; None if rows aren't in rings.
    """

    rows: torch.Tensor
    block_table: torch.Tensor
    prefix_lens: torch.Tensor
    seq_lens: torch.Tensor
    own_start: torch.Tensor
    sink_slots: torch.Tensor
    query_start: torch.Tensor
    token_request: torch.Tensor
    token_position: torch.Tensor
    seal_request: torch.Tensor
    seal_tile: torch.Tensor
    task_request: torch.Tensor
    task_row: torch.Tensor
    work_end: torch.Tensor
    rows_per_task: int
    columns: int
    rows_in_ring: bool
    plan: PrefillPlan | None = None
    hits_inside: bool = True
    parts: "tuple[StepPart, ...]" = ()
    fills: torch.Tensor | None = None

    def with_rings(self, rows: torch.Tensor) -> "Step":
        """Return the same step of the same requests with other rings, [requests], int32."""
        parts = (replace(part, step=replace(part.step, rows=rows[part.requests])) for part in self.parts)
        return replace(self, rows=rows, parts=tuple(parts))

    @property
    def restores_first(self) -> bool:
        """Whether cached rows are restored before this step's own are stored and sealed.

        Not if a tile that is sealed begins in the ring, where newer rows would have taken its rows' places.
        """
        plan = self.plan
        if plan is None or plan.short_tokens or self.hits_inside or not plan.on_tiles:
            return False
        return len(plan.segments) == 1 and plan.segments[0].restored

    @property
    def stores_first(self) -> bool:
        """Whether all of this step's rows are stored before they are attended to.

        So where no query reads rows that they push out, and no tile that they fill begins among those.
        """
        if self.rows_in_ring or self.restores_first:
            return True
        return self.plan is not None and not self.plan.short_tokens and not self.plan.most_restored


@dataclass(frozen=True, slots=True)
class StepPart:
    """A part of a step.

    Args:
        tokens: [rows], int64: which of the step's rows it has.
        requests: [requests], int64: which of the step's requests it has.
        step: the part, a step itself.
    """

    tokens: torch.Tensor
    requests: torch.Tensor
    step: Step


def decode_step(
    state: TailState,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    group: int,
    widest: int | None = None,
) -> Step:
    """Describe a step that adds one token to every request.

    Args:
        state: ring owners and sinks.
        rows: [requests], int32.
        seq_lens: [requests], int32, the new token included; 0 for padding.
        block_table: [requests, pages], int32; padding stands on block 0.
        group: query heads of one kv head.
        widest: as of `verify_step`.

    Graph-safe: yes; every shape follows from the number of requests.
    """
    return verify_step(state, rows, seq_lens, block_table, group, 1, widest)


def verify_step(
    state: TailState,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    group: int,
    rows_each: int,
    widest: int | None = None,
) -> Step:
    """Describe a step that adds as many tokens to every request: one that is certain, and drafts to be verified.

    How many drafts are accepted is not asked: the request's next step begins where they end.

    Args:
        state: ring owners and sinks.
        rows: [requests], int32.
        seq_lens: [requests], int32, the new tokens included; fewer than rows_each for padding.
        block_table: [requests, pages], int32; padding stands on block 0.
        group: query heads of a kv head.
        rows_each: tokens that each request gets, at most one more than `CacheConfig.draft_tokens`.
        widest: query columns of a program, unless the group is larger; None for those over keys and values.

    Raises:
        ValueError: rings aren't wide enough for so many drafts.

    Graph-safe: yes; every shape follows from the number of requests and from rows_each.
    """
    config = state.config
    if not 1 <= rows_each <= config.draft_tokens + 1:
        raise ValueError(f"A step of {rows_each} tokens a request needs rings for {rows_each - 1} drafts.")
    widest = widest or widest_columns(config.layout, rows.device)
    if not runs_triton(state.page_slot):
        return verify_step_reference(state, rows, seq_lens, block_table, group, rows_each, widest)
    from kvarn.core.kernels.step import verify_step_kernel

    rows_per_task, _ = task_shape(config, group, rows_each, widest)
    requests, tasks_each, several = rows.shape[0], -(-rows_each // rows_per_task), rows_each > 1
    out = aligned_ints(12 if several else 8, max(requests + 1, requests * rows_each), rows.device)
    launch(
        verify_step_kernel, (1,),
        rows, seq_lens, block_table, state.ring_end, state.ring_page, state.sure_end, state.sure_page, state.own_start,
        state.page_writer, state.page_slot, state.free_slots, state.free_count, state.faults, out, requests,
        rows_each, tasks_each, rows_per_task, block_table.stride(0), out.stride(0), G=config.tile_tokens,
        PADDING_PAGES=config.tiles_per_block, SINKS=config.sink_tokens > 0, SEVERAL=several,
        DRAFTS=config.draft_tokens, BLOCK=_STEP_BLOCK,
    )  # fmt: skip
    fields = dict(zip(_UNIFORM_FIELDS, out[:, :requests], strict=False))
    index, fields["fills"] = out[5, : requests + 1], out[-1, :1]
    if several:
        query_start = out[6, : requests + 1]
        token_request, token_position = out[7:9, : requests * rows_each]
        task_request, task_row = out[9:11, : requests * tasks_each]
    else:
        query_start, token_request, token_position = index, index[:-1], fields["prefix_lens"]
        task_request, task_row = index[:-1], out[6, :requests]
    return _verify_step(
        config, group, rows_each, widest, rows=rows, block_table=block_table, query_start=query_start,
        token_request=token_request, token_position=token_position, seal_request=index[:-1],
        task_request=task_request, task_row=task_row, **fields,
    )  # fmt: skip


def verify_step_reference(
    state: TailState,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    group: int,
    rows_each: int,
    widest: int = VERIFY_COLUMNS,
) -> Step:
    """Describe a verify step by operations of torch."""
    tile_tokens, device = state.config.tile_tokens, rows.device
    seq_lens = seq_lens.clamp_min(rows_each)
    prefix_lens = seq_lens - rows_each
    own_start, _ = state.begin(rows, prefix_lens, seq_lens, block_table)
    tiles = torch.stack((prefix_lens, seq_lens - 1)).long() // tile_tokens
    pages = block_table.gather(1, tiles.T).T.contiguous()
    state.note_writers(pages[0], rows)
    state.note_writers(pages[1], rows)
    # a request starts one page at most, which then holds its last row
    starts = tiles[1] * tile_tokens
    state.update_sinks(torch.where(starts >= prefix_lens, starts, 1).to(torch.int32), pages[1])
    index = torch.arange(rows.shape[0] + 1, dtype=torch.int32, device=device)
    seal_tile = torch.where(seq_lens // tile_tokens > prefix_lens // tile_tokens, seq_lens // tile_tokens - 1, -1)
    rows_per_task, _ = task_shape(state.config, group, rows_each, widest)
    token_row, task_row = (
        torch.arange(0, rows_each, step, dtype=torch.int32, device=device) for step in (1, rows_per_task)
    )
    return _verify_step(
        state.config,
        group,
        rows_each,
        widest,
        rows=rows,
        block_table=block_table,
        prefix_lens=prefix_lens,
        seq_lens=seq_lens,
        own_start=own_start,
        sink_slots=state.page_slot[block_table[:, 0].long()],
        query_start=index * rows_each,
        token_request=index[:-1].repeat_interleave(rows_each),
        token_position=(prefix_lens[:, None] + token_row).flatten(),
        seal_request=index[:-1],
        seal_tile=seal_tile,
        fills=(seal_tile >= 0).any().to(torch.int32)[None],
        task_request=index[:-1].repeat_interleave(task_row.shape[0]),
        task_row=task_row.repeat(rows.shape[0]),
    )


def _verify_step(config: CacheConfig[Any], group: int, rows_each: int, widest: int, **fields: Any) -> Step:
    """Make a Step in which every request has as many rows and may fill one tile, its work counted."""
    rows_per_task, columns = task_shape(config, group, rows_each, widest)
    named = {name: fields[name] for name in Tasks._fields if name in fields}
    work_end = count_work(config, Tasks(rows_per_task=rows_per_task, rows_in_ring=True, **named))
    return Step(work_end=work_end, rows_per_task=rows_per_task, columns=columns, rows_in_ring=True, **fields)


def task_shape(config: CacheConfig[Any], group: int, rows_each: int, widest: int) -> tuple[int, int]:
    """Return the query rows and columns of an attention task, where every request has as many rows.

    Of several rows a task takes as many as its columns hold, used or not: each shape is a variant of the kernel.
    In batch-invariant mode it is one row: the queries of a task are divided by one number, and one row is read by the
    same variant of the kernel whether it is decoded, verified or part of a chunk.
    """
    most = 1 if config.batch_invariant else max(1, widest // group)
    rows = -(-rows_each // -(-rows_each // most))
    columns = max(DECODE_COLUMNS, power_of_two(rows * group))
    return (columns // group if rows > 1 else 1), columns


def aligned_ints(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Return an uninitialised int32 tensor whose rows all start at multiples of 128 bytes, [rows, columns].

    Triton compiles a kernel once for aligned pointers and once more for others.
    """
    return torch.empty(rows, -(-columns // 32) * 32, dtype=torch.int32, device=device)[:, :columns]


def record_end(config: CacheConfig[Any], step: Step, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Return the position up to which queries of a step read records. Those of a long chunk read as its first does.

    Args:
        config: shared numbers.
        step: the forward pass.
        request: [queries], int64.
        position: [queries], int32, position of each query.
    """
    committed = (step.seq_lens if config.canonical else step.prefix_lens)[request]
    if step.plan is not None:
        is_long = step.query_start.diff()[request] > step.plan.most_short
        position = torch.where(is_long, step.prefix_lens[request], position)
    return read_rule.record_end(config, committed, position, step.own_start[request])


def int32_words(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return an int32 or int64 vector as int32 words, low word first, and how many words lie between its numbers.

    For kernels that take either: Triton compiles a kernel once for every dtype, and engines choose theirs.
    """
    return x.view(torch.int32), x.element_size() // torch.int32.itemsize


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
