"""World: one engine, the real TailState and steps, and the oracle over them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lifecycle_engine import Engine, Request
from lifecycle_oracle import Oracle

from kvarn.core import chunk_step as chunk_step_module
from kvarn.core import step as step_module
from kvarn.core.cache import CacheConfig
from kvarn.core.layout import TileLayout
from kvarn.core.step import Step
from kvarn.core.tail import TailState, owner_tags
from kvarn.presets import get_preset

TILE = 64
MAX_TILES = 6
GROUP = 4  # query heads of a kv head
EVENTS = (
    "hits", "retractions", "aborts", "seals", "row reuse", "page reuse", "sink exhaustion", "sink reads",
    "mixed batches", "continuations in the same row", "deduplications", "evictions", "flushes", "padding rows",
    "overruns", "reused ids", "ids taken over", "chunk ends inside a tile", "decode steps", "chunk steps",
)  # fmt: skip
DRAFT_EVENTS = ("verify steps", "accepted drafts", "rejected drafts", "tiles of rejected drafts")


@dataclass(frozen=True)
class Setting:
    """Numbers of one world."""

    tail: int
    sink: int
    canonical: bool = False
    rows: int = 6
    pages: int = 22
    sink_slots: int = 4
    newest_page_first: bool = True
    drafts: int = 0

    @property
    def config(self) -> CacheConfig:
        layout = TileLayout.of(get_preset("kvarn_k4v2_g64"), 64)
        ring = TILE + self.tail + self.drafts
        return CacheConfig(layout, 1, self.tail, self.sink, ring, self.canonical, draft_tokens=self.drafts)


SETTINGS = {
    "tail-64-sinks-4": Setting(64, 4),
    "tail-128-one-slot": Setting(128, 4, sink_slots=1, newest_page_first=False),
    "odd-tail-37": Setting(37, 5, pages=14, rows=4, drafts=5),
    "no-tail-no-sinks": Setting(0, 0, newest_page_first=False),
    "canonical": Setting(0, 0, canonical=True, drafts=3),
}


class World:
    """Moves an engine by forward passes; each is described by the real code and checked by the oracle."""

    def __init__(self, setting: Setting, config: CacheConfig | None = None, device: str = "cpu") -> None:
        self.config = config or setting.config
        self.device = device
        self.engine = Engine(TILE, setting.rows, setting.pages, MAX_TILES, newest_page_first=setting.newest_page_first)
        self.state = TailState(self.config, setting.rows, setting.pages, setting.sink_slots, device)
        self.oracle = Oracle(self.config, self.state, self.engine)
        self.ending: dict[Request, int] = {}
        self.steps = 0
        self._last_of_row: dict[int, tuple[int, int]] = {}

    @property
    def counts(self) -> Counter[str]:
        return self.engine.counts + self.oracle.counts

    @property
    def prefilling(self) -> list[Request]:
        return [r for r in self.engine.running if r not in self.ending and not r.decodes]

    @property
    def decoding(self) -> list[Request]:
        return [r for r in self.engine.running if r not in self.ending and r.decodes]

    def admit(self, request: Request) -> bool:
        if not self.engine.admit(request):
            return False
        left = (request.computed, request.tags[request.computed - 1])
        self.engine.counts["continuations in the same row"] += self._last_of_row.get(request.row) == left
        return True

    def decode(self, requests: Sequence[Request], padding: int = 0) -> None:
        """Add a token to every request, and to those whose end is known too late to leave them out."""
        self.verify(requests, [], padding)

    def verify(self, requests: Sequence[Request], accepted: Sequence[int], padding: int = 0, drafts: int = 0) -> None:
        """Add a token to every request, as in decode, and drafts, of which so many are right; none past the list."""
        batch = [r for r in [*requests, *self.ending] if self._reserve(r, 1 + drafts)]
        if batch:
            kept = [*accepted, *[0] * len(batch)][: len(batch)]
            for request, right in zip(batch, kept, strict=True):
                request.draft(right, drafts, self.steps & 3)
            seq_lens = self._ints([r.computed + 1 + drafts for r in batch] + [1] * padding)
            rows = [r.row for r in batch] + [0] * padding
            table = self._table(rows, MAX_TILES)
            if drafts:
                step = step_module.verify_step(self.state, self._ints(rows), seq_lens, table, GROUP, 1 + drafts)
            else:
                step = step_module.decode_step(self.state, self._ints(rows), seq_lens, table, GROUP)
            self._run(step, [(r, 1 + drafts) for r in batch], padding * (1 + drafts))
            for request, right in zip(batch, kept, strict=True):
                sealed = (request.computed + 1 + drafts) // TILE
                self.engine.counts["tiles of rejected drafts"] += sealed > (request.computed + 1 + right) // TILE
                request.reject(request.computed + 1 + right)
            self._advance([(r, 1 + right) for r, right in zip(batch, kept, strict=True)])
            self.engine.counts["verify steps" if drafts else "decode steps"] += 1
            self.engine.counts["accepted drafts"] += sum(kept)
            self.engine.counts["rejected drafts"] += len(batch) * drafts - sum(kept)
            self.engine.counts["padding rows"] += padding
        for request in [*self.ending]:
            self._release(request, self.ending.pop(request))

    def chunk(self, parts: Sequence[tuple[Request, int]]) -> None:
        """Compute the next tokens of every request: chunks of prompts, single tokens of running ones, or both."""
        batch = [(r, min(n, len(r.tokens) - r.computed)) for r, n in parts]
        batch = [(r, n) for r, n in batch if self._reserve(r, n)]
        if not batch:
            return
        requests = [r for r, _ in batch]
        seq_lens = [r.computed + n for r, n in batch]
        rows = [r.row for r in requests]
        step, _ = chunk_step_module.chunk_step(
            self.state,
            self._ints(rows),
            self._ints([r.computed for r in requests]),
            self._ints(seq_lens),
            owner_tags([r.rid for r in requests]).to(self.device),
            self._table(rows, -(-max(seq_lens) // TILE)),
            GROUP,
            sum(n for _, n in batch),
        )
        single = {r.decodes for r in requests}
        self.engine.counts["chunk steps"] += 1
        self.engine.counts["mixed batches"] += len(single) == 2
        self._run(step, batch, 0)
        self._advance(batch)
        for request, _ in batch:
            self.engine.counts["chunk ends inside a tile"] += request.computed % TILE != 0
            self.engine.publish(request, request.computed)

    def finish(self, request: Request, *, overrun: bool = False) -> None:
        """End a request and publish its tiles; with `overrun`, one more decode step is under way already."""
        self._end(request, request.computed, overrun)

    def abort(self, request: Request, *, overrun: bool = False) -> None:
        """End a request at any point, its private pages lost."""
        if request in self.engine.waiting:
            self.engine.waiting.remove(request)
        else:
            self._end(request, 0, overrun and request.decodes)
        self.engine.counts["aborts"] += 1

    def retract(self, request: Request) -> None:
        """Send a running request back to the queue, nothing of it saved."""
        self._last_of_row.pop(request.row, None)
        self.engine.retract(request)

    def flush(self) -> None:
        """Abort everything and empty the tree, as flush_cache demands."""
        for request in [*self.engine.running]:
            self.ending.pop(request, None)
            self.abort(request)
        self.engine.flush()

    def check(self) -> None:
        self.engine.check()
        self.state.check_integrity()

    def _end(self, request: Request, keep: int, overrun: bool) -> None:
        if overrun:
            self.ending[request] = keep
            self.engine.counts["overruns"] += 1
        else:
            self._release(request, keep)

    def _release(self, request: Request, keep: int) -> None:
        self._last_of_row.pop(request.row, None)
        if keep:
            self._last_of_row[request.row] = (keep, request.tags[keep - 1])
        self.engine.release(request, keep)

    def _reserve(self, request: Request, count: int) -> bool:
        return count > 0 and self.engine.reserve(request, count)

    def _table(self, rows: Sequence[int], width: int) -> torch.Tensor:
        return torch.tensor([self.engine.table[row][:width] for row in rows], dtype=torch.int32, device=self.device)

    def _ints(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _run(self, step: Step, batch: Sequence[tuple[Request, int]], padding: int) -> None:
        self.oracle.run(step, batch, padding)

    def _advance(self, batch: Sequence[tuple[Request, int]]) -> None:
        self.steps += 1
        for request, count in batch:
            request.computed += count
            if request.computed == len(request.tokens):
                request.sample(self.steps & 3)


def prompt(family: int, branch_at: int, branch: int, length: int) -> list[int]:
    """A prompt of one of a few families that share prefixes and branch off."""
    return [family + 2 if i < branch_at else 16 * (branch + 1) + family for i in range(length)]
