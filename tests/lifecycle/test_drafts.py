"""Rejected drafts never touch history: any chain of drafts and rejections equals the run that saw accepted tokens only.

Every number of drafts up to five, every number of them accepted, at every place in a tile, then more drafts at random.
After each step all that was rejected is overwritten with NaN, in rings and records. Attention is computed in float64,
so that only the order of sums is left to differ. Runs on the torch references.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from kvarn.core import step as step_module
from kvarn.core.append import RotatedRows, rotate_rows, store_tail
from kvarn.core.attend import attend_reference
from kvarn.core.cache import CacheConfig, LayerCache, allocate_layer
from kvarn.core.chunk_step import chunk_step
from kvarn.core.latent.append import rotate_latents, store_latents
from kvarn.core.latent.attend import attend_latents_reference
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.rows import split_rows
from kvarn.core.latent.seal import seal_latents
from kvarn.core.layout import TileLayout
from kvarn.core.seal import seal
from kvarn.core.step import Step, decode_step, verify_step
from kvarn.core.tail import TailState
from kvarn.presets import get_preset

DRAFTS = 5
GROUP, SCALE = 2, 0.1
FOLLOWING_STEPS = 3
PATTERNS = [(drafts, accepted) for drafts in range(1, DRAFTS + 1) for accepted in range(drafts + 1)]


class Tiles:
    """What a step does where keys and values are cached."""

    rows = 2
    seal = staticmethod(seal)
    store = staticmethod(store_tail)

    @staticmethod
    def rotate(rows: Sequence[torch.Tensor], layer: LayerCache, step: Step) -> RotatedRows:
        return rotate_rows(*rows, layer, step, store=step.rows_in_ring)

    @staticmethod
    def attend(q: torch.Tensor, rotated: RotatedRows, layer: LayerCache, step: Step) -> torch.Tensor:
        return attend_reference(q, rotated, layer, step, SCALE)[0]


class Latents:
    """What a step does where latents are cached."""

    rows = 1
    seal = staticmethod(seal_latents)
    store = staticmethod(store_latents)

    @staticmethod
    def rotate(rows: Sequence[torch.Tensor], layer: LayerCache[LatentLayout], step: Step) -> torch.Tensor:
        return rotate_latents(split_rows(rows[0][:, 0], layer.config.layout), layer, step, store=step.rows_in_ring)

    @staticmethod
    def attend(q: torch.Tensor, raw: torch.Tensor, layer: LayerCache[LatentLayout], step: Step) -> torch.Tensor:
        return attend_latents_reference(*split_rows(q, layer.config.layout), raw, layer, step, SCALE)[0]


@dataclass(frozen=True)
class Case:
    """A cache and the places in a tile at which drafts are tried."""

    preset: str
    head_dim: int
    tail: int
    sink: int
    places: Sequence[int]
    canonical: bool = False
    rope_dim: int = 0

    @property
    def config(self) -> CacheConfig:
        layout = TileLayout.of(get_preset(self.preset), self.head_dim)
        if self.rope_dim:
            layout = LatentLayout.of(get_preset(self.preset), self.head_dim, self.rope_dim, rope_bits=8)
        ring = layout.tile_tokens + self.tail + DRAFTS
        return CacheConfig(layout, 1, self.tail, self.sink, ring, self.canonical, draft_tokens=DRAFTS)


EDGES = [0, 1, 2, 3, 4, 5, 31, 58, 59, 60, 61, 62, 63]
CASES = {
    "tail-64": Case("kvarn_k4v2_g64", 64, 64, 4, range(64)),
    "tail-37": Case("kvarn_k4v2_g64", 96, 37, 5, EDGES),
    "tail-of-drafts": Case("kvarn_k4v2_g64", 64, DRAFTS, 0, EDGES),
    "canonical": Case("kvarn_k4v2_g64", 64, 0, 0, EDGES, canonical=True),
    "tiles-of-128": Case("kvarn_k4v2_g128", 64, 128, 4, [0, 1, 63, 64, 123, 124, 125, 126, 127]),
    "latents": Case("kvarn_k4v2_g64", 128, 37, 5, [0, 1, 31, 58, 59, 60, 62, 63], rope_dim=16),
    "canonical-latents": Case("kvarn_k4v2_g64", 128, 0, 0, [0, 59, 62, 63], canonical=True, rope_dim=16),
}


class Sequences:
    """Requests with the same tokens and pages of their own, moved by steps in which drafts may be wrong.

    Args:
        config: of the cache.
        begins: tokens of each request that one chunk computes at once.
        length: most tokens of a request.
    """

    def __init__(self, config: CacheConfig, begins: Sequence[int], length: int) -> None:
        self.config = config
        self.operations = Latents if isinstance(config.layout, LatentLayout) else Tiles
        generator = torch.Generator().manual_seed(0)
        heads, (_, width) = (GROUP, *[1] * self.operations.rows), config.layout.raw_shape
        self.true = [torch.randn(length, n, width, generator=generator).half() for n in heads]
        self.true[1][..., :2] += torch.tensor([30.0, -8.0]).half()
        tiles = -(-length // config.tile_tokens)
        pages = 1 + torch.randperm(len(begins) * tiles, generator=generator).to(torch.int32)
        self.table = pages.view(len(begins), tiles)
        self.layer = allocate_layer(config, pages.numel() + 1, len(begins) + 1, len(begins), torch.float16, "cpu")
        for kept, poison in ((self.layer.records, 0xFF), (self.layer.tails, torch.nan), (self.layer.sinks, torch.nan)):
            kept.fill_(poison)
        self.state = TailState(config, len(begins) + 1, pages.numel() + 1, len(begins), "cpu")
        self.rows = torch.arange(1, len(begins) + 1, dtype=torch.int32)
        self.done = [0] * len(begins)
        self.step(begins, begins, chunk=True, attend=False)

    def step(
        self, counts: Sequence[int], accepted: Sequence[int], *, chunk: bool = False, attend: bool = True
    ) -> list[torch.Tensor]:
        """Compute so many tokens of each request, of which the first `accepted` are right; return the output of those.

        Counts are equal unless a chunk is asked for. What was rejected is NaN afterwards.
        """
        q, *rows = self._tokens(counts, accepted)
        ends = self._ints([done + count for done, count in zip(self.done, counts, strict=True)])
        if chunk:
            begins = self._ints(self.done)
            step, _ = chunk_step(self.state, self.rows, begins, ends, None, self.table, GROUP, sum(counts))
        elif counts[0] == 1:
            step = decode_step(self.state, self.rows, ends, self.table, GROUP)
        else:
            step = verify_step(self.state, self.rows, ends, self.table, GROUP, counts[0])
        rotated = self.operations.rotate(rows, self.layer, step)
        self.operations.seal(rotated, self.layer, step)
        outs: list[torch.Tensor] = []
        if attend:
            out = self.operations.attend(q.double(), rotated, self.layer, step)
            outs = [part[:n] for part, n in zip(out.split(list(counts)), accepted, strict=True)]
        if not step.rows_in_ring:
            self.operations.store(rotated, self.layer, step)
        self._accept(counts, accepted)
        assert int(self.state.faults) == 0
        self.state.check_integrity()
        return outs

    def records(self, i: int) -> torch.Tensor:
        """Return the records of a request's full tiles."""
        return self.layer.records[self.layer.pages_of(self.table[i, : self.done[i] // self.config.tile_tokens].long())]

    def _accept(self, counts: Sequence[int], accepted: Sequence[int]) -> None:
        for i, (count, kept) in enumerate(zip(counts, accepted, strict=True)):
            wrong = torch.arange(self.done[i] + kept, self.done[i] + count) % self.config.ring_tokens
            self.layer.tails[self.rows[i], :, :, wrong] = torch.nan
            self.done[i] += kept
            provisional = self.table[i, self.done[i] // self.config.tile_tokens :].long()
            self.layer.records[self.layer.pages_of(provisional)] = 0xFF

    def _tokens(self, counts: Sequence[int], accepted: Sequence[int]) -> list[torch.Tensor]:
        """Return queries and rows: the sequence's, and far larger ones for drafts that will be rejected."""
        rows: list[list[torch.Tensor]] = [[] for _ in self.true]
        for done, count, kept in zip(self.done, counts, accepted, strict=True):
            for into, true in zip(rows, self.true, strict=True):
                into += [true[done : done + kept], true[: count - kept] * 50]
        return [torch.cat(parts) for parts in rows]

    @staticmethod
    def _ints(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32)


@dataclass(frozen=True)
class Run:
    """A case, what its tokens must give when no draft is ever made, and its requests before their first drafts."""

    case: Case
    start: int
    length: int
    outs: torch.Tensor
    records: torch.Tensor
    ready: Sequences

    @classmethod
    def of(cls, case: Case, config: CacheConfig | None = None) -> "Run":
        """Compute every token by a decode step of its own; requests begin in the third tile."""
        tile = case.config.tile_tokens
        start, length = 2 * tile, 3 * tile + 3 * (DRAFTS + 1) * FOLLOWING_STEPS
        alone = Sequences(case.config, [start], length)
        outs = torch.cat([alone.step([1], [1])[0] for _ in range(start, length)])
        ready = Sequences(config or case.config, [start + place for place in case.places], length)
        return cls(case, start, length, outs, alone.records(0), ready)

    def check(self, drafts: int, accepted: int) -> None:
        """Try a pattern at every place, then others, and compare everything.

        Raises:
            AssertionError: an output or a record is another than without drafts.
        """
        pick = random.Random(f"{drafts}/{accepted}")
        requests = copy.deepcopy(self.ready)
        count = len(requests.done)
        self._compare(requests, [drafts + 1] * count, [accepted + 1] * count, chunk=False)
        for _ in range(FOLLOWING_STEPS):
            chunk, each = pick.random() < 0.3, pick.randrange(1, DRAFTS + 2)
            counts = [pick.randrange(1, DRAFTS + 2) if chunk else each for _ in requests.done]
            self._compare(requests, counts, [pick.randrange(1, n + 1) for n in counts], chunk=chunk)
        left = [self.length - 1 - done for done in requests.done]
        requests.step(left, left, chunk=True, attend=False)
        self._compare(requests, [1] * count, [1] * count, chunk=False)
        for i in range(count):
            assert torch.equal(requests.records(i), self.records)

    def _compare(self, requests: Sequences, counts: list[int], accepted: list[int], *, chunk: bool) -> None:
        begins = [done - self.start for done in requests.done]
        for begin, out in zip(begins, requests.step(counts, accepted, chunk=chunk), strict=True):
            torch.testing.assert_close(out, self.outs[begin : begin + len(out)], rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def run(request: pytest.FixtureRequest) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVARN_FORCE_TRITON", "0")
        return Run.of(request.param)


@pytest.mark.parametrize(("drafts", "accepted"), PATTERNS)
def test_any_pattern_at_any_place_equals_a_run_without_drafts(run: Run, drafts: int, accepted: int) -> None:
    run.check(drafts, accepted)


def test_a_ring_one_row_short_is_noticed() -> None:
    """What the comparison above rests on: drafts push out rows that are still read."""
    case = CASES["tail-64"]
    config = case.config
    object.__setattr__(config, "ring_tokens", config.ring_tokens - 1)  # past the constructor's own check
    short = Run.of(case, config)
    with pytest.raises(AssertionError):
        short.check(DRAFTS, 0)


def test_a_query_that_reads_a_provisional_record_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["tail-of-drafts"]
    run = Run.of(case)
    real = step_module.record_end

    def lie(config: CacheConfig, step: Step, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        config = replace(config, tail_tokens=0)
        return real(config, replace(step, prefix_lens=step.seq_lens + DRAFTS), request, position + DRAFTS)

    monkeypatch.setattr("kvarn.core.attend.record_end", lie)
    with pytest.raises(AssertionError):
        run.check(DRAFTS, 0)
