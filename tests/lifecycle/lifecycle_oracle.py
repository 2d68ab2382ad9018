"""The oracle: shadow contents of every ring row, sink row and record, and what each query of a step resolves to.

Contents are tags instead of numbers. Writes go exactly where a Step says; reads follow `record_end` and must find, for
every query and every position up to its own, the right token's row, written by the right request, in a live page.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lifecycle_engine import Engine, Request

from kvarn.core import step as step_module
from kvarn.core.cache import CacheConfig
from kvarn.core.step import Step
from kvarn.core.tail import TailState


class Violation(AssertionError):
    """A step reads, writes or keeps something that it must not."""


def demand(holds: bool, message: str) -> None:
    if not holds:
        raise Violation(message)


@dataclass(frozen=True)
class View:
    """A Step as lists, and the batch that it must describe: (request, tokens) in order, then padding rows."""

    step: Step
    batch: Sequence[tuple[Request, int]]
    rows: list[int]
    prefix: list[int]
    seq: list[int]
    own_start: list[int]
    slots: list[int]
    start: list[int]
    token_request: list[int]
    token_position: list[int]
    seals: list[tuple[int, int]]
    fresh: list[tuple[str, int] | None]

    @classmethod
    def of(cls, step: Step, batch: Sequence[tuple[Request, int]], padding: int) -> "View":
        fresh = [row for request, count in batch for row in request.rows[request.computed : request.computed + count]]
        seals = zip(step.seal_request.tolist(), step.seal_tile.tolist(), strict=True)
        return cls(
            step,
            batch,
            step.rows.tolist(),
            step.prefix_lens.tolist(),
            step.seq_lens.tolist(),
            step.own_start.tolist(),
            step.sink_slots.tolist(),
            step.query_start.tolist(),
            step.token_request.tolist(),
            step.token_position.tolist(),
            [(request, tile) for request, tile in seals if tile >= 0],
            [*fresh, *[None] * padding],
        )


class Oracle:
    """Shadow contents of one layer.

    A ring row holds (request id, tag); a sink row (tag, page, life of the page); a record (life of the page, tags).
    """

    def __init__(self, config: CacheConfig, state: TailState, engine: Engine) -> None:
        self.config = config
        self.state = state
        self.engine = engine
        self.rings: list[list[tuple[str, int] | None]] = [[None] * config.ring_tokens for _ in engine.table]
        self.sinks: list[list[tuple[int, int, int] | None]] = [
            [None] * config.sink_tokens for _ in range(state.free_slots.shape[0])
        ]
        self.records: list[tuple[int, list[int]] | None] = [None] * len(engine.page_life)
        self.counts: Counter[str] = Counter()
        self._first_pages: set[int] = set()
        self._slot_of: dict[int, int] = {}

    def run(self, step: Step, batch: Sequence[tuple[Request, int]], padding: int = 0) -> None:
        """Apply a step in the order of `kvarn.core.attention` and check it."""
        view = View.of(step, batch, padding)
        self._check_shape(view)
        self._check_sinks(view)
        if step.rows_in_ring:
            self._store(view)
        self._seal(view)
        self._check_reads(view)
        if not step.rows_in_ring:
            self._store(view)
        demand(int(self.state.faults) == 0, "an open tile was lost")
        self.state.check_integrity()

    def _check_shape(self, view: View) -> None:
        """The step describes this batch, and its attention tasks serve every query row once."""
        at = 0
        for i, (request, count) in enumerate(view.batch):
            length = request.computed + count
            described = (view.rows[i], view.prefix[i], view.seq[i], view.start[i])
            demand(described == (request.row, request.computed, length, at), f"request {i} is described as {described}")
            positions = list(range(request.computed, length))
            demand(view.token_position[at : at + count] == positions, f"token positions of request {i}")
            demand(view.token_request[at : at + count] == [i] * count, f"token owners of request {i}")
            at += count
        tasks = zip(view.step.task_request.tolist(), view.step.task_row.tolist(), strict=True)
        served = Counter((owner, row + j) for owner, row in tasks if owner >= 0 for j in range(view.step.rows_per_task))
        wanted = [(i, j) for i, (_, count) in enumerate(view.batch) for j in range(count)]
        demand(all(served[row] == 1 for row in wanted), "a query row is served by no task or by several")

    def _check_sinks(self, view: View) -> None:
        """First pages alone hold slots, keep them until started anew, and go without only when none is free."""
        started: dict[int, bool] = {}
        for i, (request, count) in enumerate(view.batch):
            for position in range(request.computed, request.computed + count):
                if position % self.config.tile_tokens == 0:
                    tile = position // self.config.tile_tokens
                    started[self.engine.table[view.rows[i]][tile]] = position == 0
        self._first_pages -= started.keys()
        self._first_pages |= {page for page, is_first in started.items() if is_first}
        slot_of = {page: slot for page, slot in enumerate(self.state.page_slot.tolist()) if slot >= 0}
        demand(slot_of.keys() <= self._first_pages, "a page that is no first page holds a sink slot")
        for page, slot in self._slot_of.items():
            demand(page in started or slot_of.get(page) == slot, f"page {page} lost its sink slot while it lived")
        if self.config.sink_tokens:
            denied = [page for page, is_first in started.items() if is_first and page not in slot_of]
            demand(not denied or int(self.state.free_count) == 0, "a slot is free but a first page got none")
            self.counts["sink exhaustion"] += len(denied)
        for i in range(len(view.batch)):
            page = self.engine.table[view.rows[i]][0]
            demand(view.slots[i] == slot_of.get(page, -1), f"request {i} is given another page's sink slot")
        self._slot_of = slot_of

    def _store(self, view: View) -> None:
        ring = self.config.ring_tokens
        for token, (i, position) in enumerate(zip(view.token_request, view.token_position, strict=True)):
            row = view.fresh[token]
            if position >= view.seq[i] - ring:
                self.rings[view.rows[i]][position % ring] = row
            if row is not None and view.slots[i] >= 0 and position < self.config.sink_tokens:
                page = self.engine.table[view.rows[i]][0]
                self.sinks[view.slots[i]][position] = (row[1], page, self.engine.page_life[page])

    def _seal(self, view: View) -> None:
        """Make records from rows as `kvarn.core.seal` finds them."""
        tokens = self.config.tile_tokens
        full = [
            (i, tile)
            for i, (request, count) in enumerate(view.batch)
            for tile in range(request.computed // tokens, (request.computed + count) // tokens)
        ]
        demand(sorted(view.seals) == full, f"tiles {view.seals} are sealed, tiles {full} became full")
        for i, tile in full:
            ring_end = view.seq[i] if view.step.rows_in_ring else view.prefix[i]
            rows = [self._raw(view, i, position, ring_end) for position in range(tile * tokens, (tile + 1) * tokens)]
            page = self.engine.table[view.rows[i]][tile]
            own = view.batch[i][0].rows[tile * tokens : (tile + 1) * tokens]
            demand(rows == own, f"tile {tile} of request {i} is sealed from rows that aren't its own")
            self.records[page] = (self.engine.page_life[page], [tag for _, tag in rows])
            self.counts["seals"] += 1

    def _check_reads(self, view: View) -> None:
        owner, position = view.step.token_request.long(), view.step.token_position
        ends = step_module.record_end(self.config, view.step, owner, position).tolist()
        for i, (request, count) in enumerate(view.batch):
            checked = -1
            for p, end in zip(range(request.computed, request.computed + count), ends[view.start[i] :], strict=False):
                self._check_rule(view, i, p, end)
                if end != checked:
                    self._check_records(request, end, view.slots[i])
                    self._check_raw(view, i, end)
                    checked = end

    def _check_rule(self, view: View, i: int, p: int, end: int) -> None:
        """Records below `end`: whole committed tiles, none of the exact tail that the request wrote itself."""
        committed = view.seq[i] if self.config.canonical else view.prefix[i]
        where = f"query {p} of request {i} reads records up to {end}"
        demand(end % self.config.tile_tokens == 0 and 0 <= end <= p, f"{where}: no whole tiles below it")
        demand(end <= committed, f"{where}: provisional beyond {committed}")
        own_start = view.own_start[i]
        demand(0 <= own_start <= view.prefix[i], f"{where}: own rows from {own_start}")
        demand(end <= max(p - self.config.tail_tokens, own_start), f"{where}: not its exact tail")
        demand(end >= own_start, f"{where}: raw rows before {own_start} are not its own")

    def _check_records(self, request: Request, end: int, slot: int) -> None:
        """Positions below `end` hold this sequence, in records of live pages and in the first page's sinks."""
        tokens, row = self.config.tile_tokens, self.engine.table[request.row]
        for tile in range(end // tokens):
            page = row[tile]
            wanted = (self.engine.page_life[page], request.tags[tile * tokens : (tile + 1) * tokens])
            demand(self.records[page] == wanted, f"record of tile {tile} in page {page} is stale or another's")
        if slot >= 0 and end:
            first = row[0]
            life = self.engine.page_life[first]
            exact = [(tag, first, life) for tag in request.tags[: self.config.sink_tokens]]
            demand(self.sinks[slot] == exact, f"sink slot {slot} is stale or another's")
            self.counts["sink reads"] += 1

    def _check_raw(self, view: View, i: int, begin: int) -> None:
        """Positions from `begin` hold rows that this request wrote itself."""
        request, length = view.batch[i][0], view.seq[i]
        ring_end = length if view.step.rows_in_ring else view.prefix[i]
        got = [self._raw(view, i, position, ring_end) for position in range(begin, length)]
        if got != request.rows[begin:length]:
            wrong = next(j for j in range(length - begin) if got[j] != request.rows[begin + j])
            place = "ring" if begin + wrong < ring_end else "chunk"
            raise Violation(f"request {i} finds {got[wrong]} in its {place} at position {begin + wrong}")

    def _raw(self, view: View, i: int, position: int, ring_end: int) -> tuple[str, int] | None:
        if position < ring_end:
            return self.rings[view.rows[i]][position % self.config.ring_tokens]
        return view.fresh[view.start[i] + position - view.prefix[i]]
