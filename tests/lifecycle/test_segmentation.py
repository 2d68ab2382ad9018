"""A record is a function of its tile's rows alone: any segmentation of the same rows leaves the same bytes.

Runs on the torch references, and on the Triton kernels where there is a GPU. KVARN_SEGMENTATIONS (300; 10000 on a GPU)
is the number of random segmentations over all cases.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from kvarn.core.append import rotate_rows, store_tail
from kvarn.core.attention import attention
from kvarn.core.cache import CacheConfig, LayerCache, allocate_layer
from kvarn.core.chunk_step import chunk_step
from kvarn.core.layout import TileLayout
from kvarn.core.seal import seal
from kvarn.core.step import Step, decode_step
from kvarn.core.tail import TailState, owner_tags
from kvarn.presets import get_preset

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNT = int(os.environ.get("KVARN_SEGMENTATIONS", "10000" if DEVICE == "cuda" else "300"))
BATCH = 256 if DEVICE == "cuda" else 25
GROUP = 2
SCALE = 0.1

# A segment: so many tokens, and whether a decode step adds them (then it is one token).
Segment = tuple[int, bool]


@dataclass(frozen=True)
class Case:
    preset: str
    head_dim: int
    dtype: torch.dtype
    tail: int
    sink: int
    length: int
    kv_heads: int = 2

    def config(self, *, canonical: bool = False) -> CacheConfig:
        layout = TileLayout.of(get_preset(self.preset), self.head_dim)
        tail, sink = (0, 0) if canonical else (self.tail, self.sink)
        return CacheConfig(layout, self.kv_heads, tail, sink, layout.tile_tokens + tail, canonical)

    def rows(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of one sequence, with a few large channels."""
        generator = torch.Generator().manual_seed(seed)
        k, v = torch.randn(2, self.length, self.kv_heads, self.head_dim, generator=generator)
        k[..., :2] += torch.tensor([30.0, -8.0])
        q = torch.randn(self.length, self.kv_heads * GROUP, self.head_dim, generator=generator)
        return tuple(x.to(self.dtype).to(DEVICE) for x in (q, k, v))


CASES = {
    "k4v2_g64-d64-fp16": Case("kvarn_k4v2_g64", 64, torch.float16, 64, 4, 150),
    "k4v2_g128-d128-bf16": Case("kvarn_k4v2_g128", 128, torch.bfloat16, 128, 4, 300, kv_heads=1),
    "k3v3_g128-d96-fp16": Case("kvarn_k3v3_g128", 96, torch.float16, 20, 0, 300, kv_heads=1),
}


def poisoned(config: CacheConfig, requests: int, pages: int, dtype: torch.dtype) -> tuple[LayerCache, TailState]:
    """A cache full of NaN; a record of 0xFF restores to NaN as well."""
    layer = allocate_layer(config, pages, requests + 1, requests, dtype, DEVICE)
    layer.records.fill_(0xFF)
    layer.tails.fill_(float("nan"))
    layer.sinks.fill_(float("nan"))
    return layer, TailState(config, requests + 1, pages, requests, DEVICE)


class Replay:
    """Several requests with the same rows, each with pages of its own, moved by any steps."""

    def __init__(self, case: Case, config: CacheConfig, requests: int, seed: int) -> None:
        self.rows = case.rows()
        tiles = -(-case.length // config.tile_tokens)
        generator = torch.Generator().manual_seed(seed)
        pages = 1 + torch.randperm(requests * tiles, generator=generator).view(requests, tiles)
        self.table = pages.to(torch.int32).to(DEVICE)
        self.layer, self.state = poisoned(config, requests, requests * tiles + 1, case.dtype)
        self.tags = owner_tags([f"request-{i}" for i in range(requests)])
        self.done = [0] * requests

    def step(self, batch: Sequence[tuple[int, int]], *, decode: bool) -> tuple[Step, torch.Tensor]:
        """Describe a step of (request, tokens) and return it with the index of every token's row."""
        at = [i for i, _ in batch]
        begin = [self.done[i] for i in at]
        end = [b + n for b, (_, n) in zip(begin, batch, strict=True)]
        index = torch.tensor([p for b, e in zip(begin, end, strict=True) for p in range(b, e)], device=DEVICE)
        rows, table = _ints([i + 1 for i in at]), self.table[at]
        for i, n in batch:
            self.done[i] += n
        if decode:
            return decode_step(self.state, rows, _ints(end), table, GROUP), index
        tags = self.tags[at].to(DEVICE)
        return chunk_step(self.state, rows, _ints(begin), _ints(end), tags, table, GROUP, len(index))[0], index

    def write(self, batch: Sequence[tuple[int, int]], *, decode: bool) -> None:
        """Do all of a step but its attention."""
        step, index = self.step(batch, decode=decode)
        rotated = rotate_rows(*(x[index] for x in self.rows[1:]), self.layer, step, store=step.rows_in_ring)
        seal(rotated, self.layer, step)
        if not step.rows_in_ring:
            store_tail(rotated, self.layer, step)

    def attend(self, batch: Sequence[tuple[int, int]], *, decode: bool = False) -> torch.Tensor:
        step, index = self.step(batch, decode=decode)
        return attention(*(x[index] for x in self.rows), self.layer, step, SCALE)

    def write_segments(self, segments: Sequence[Sequence[Segment]]) -> None:
        """Write every request by its own segments, as many requests as possible in every step."""
        for turn in range(max(len(s) for s in segments)):
            current = [(i, s[turn]) for i, s in enumerate(segments) if turn < len(s)]
            for decode in (True, False):
                batch = [(i, count) for i, (count, decodes) in current if decodes == decode]
                if batch:
                    self.write(batch, decode=decode)

    def kept(self, request: int) -> list[torch.Tensor]:
        """Everything that a request left: full records, ring rows in order, sinks."""
        config, length = self.layer.config, self.done[request]
        records = self.layer.records[self.layer.pages_of(self.table[request, : length // config.tile_tokens].long())]
        ring = torch.arange(max(0, length - config.ring_tokens), length, device=DEVICE) % config.ring_tokens
        slot = int(self.state.page_slot[int(self.table[request, 0])])
        sinks = [self.layer.sinks[slot]] if slot >= 0 else []
        return [records, self.layer.tails[request + 1][:, :, ring], *sinks]


def _ints(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def segmentation(pick: random.Random, length: int, tile_tokens: int) -> list[Segment]:
    """Cut a sequence: few or many chunks, at random or about tile edges, the rest perhaps token by token."""
    style = pick.randrange(5)
    edges = [e + d for e in range(tile_tokens, length, tile_tokens) for d in (-1, 0, 1)]
    cuts = {
        0: list,
        1: lambda: pick.sample(range(1, length), pick.randrange(1, 4)),
        2: lambda: pick.sample(edges, pick.randrange(1, len(edges))),
        3: lambda: range(1, length, pick.randrange(2, tile_tokens + 2)),
        4: lambda: [1],
    }[style]()
    ends = sorted({*(c for c in cuts if 0 < c < length), length})
    sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    decode_from = 1 if style == 4 else pick.choice([length, pick.randrange(1, length), 1])
    segments: list[Segment] = []
    done = 0
    for size in sizes:
        if done >= decode_from:
            segments += [(1, True)] * size
        else:
            segments.append((size, size == 1 and done > 0 and pick.random() < 0.5))
        done += size
    return segments


def assert_same(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], what: object) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)), what


@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_any_segmentation_leaves_the_same_bytes(case: Case) -> None:
    pick = random.Random(7)
    config = case.config()
    alone = Replay(case, config, 1, seed=0)
    alone.write_segments([[(case.length, False)]])
    want = alone.kept(0)
    assert all(torch.isfinite(x.float()).all() for x in want[1:])
    left, kinds = COUNT // len(CASES), set()
    while left > 0:
        segments = [segmentation(pick, case.length, config.tile_tokens) for _ in range(min(BATCH, left))]
        batch = Replay(case, config, len(segments), seed=left)
        batch.write_segments(segments)
        assert int(batch.state.faults) == 0
        for i, cut in enumerate(segments):
            assert batch.done[i] == case.length
            assert_same(batch.kept(i), want, cut)
        kinds |= {decode for cut in segments for _, decode in cut} | {len(cut) == 1 for cut in segments}
        left -= len(segments)
    assert kinds == {True, False}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_another_row_gives_another_record(case: Case) -> None:
    """What the comparison above rests on: bytes do change with one element of one row."""
    config = case.config()
    replays = [Replay(case, config, 1, seed=0) for _ in range(2)]
    k = replays[1].rows[1]
    k[3, 0, 5] = k[3, 0, 5] + 2.0
    for replay in replays:
        replay.write_segments([[(case.length, False)]])
    (ours, *_), (theirs, *_) = (replay.kept(0) for replay in replays)
    assert not torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1:], theirs[1:])


@pytest.mark.parametrize("neighbour", [0, 33], ids=["alone", "with-another-request"])
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_hit_equals_miss_bitwise_in_canonical_mode(case: Case, tiles: int, neighbour: int) -> None:
    """A chunk and decode steps over a prefix of records: the same bits whether the request wrote it or found it."""
    config = case.config(canonical=True)
    shared = tiles * config.tile_tokens
    sizes = [min(40, case.length - shared - 8)] + [1] * 5
    outs = []
    for hit in (False, True):
        replay = Replay(case, config, 3, seed=3)
        replay.write([(0 if hit else 1, shared)], decode=False)
        replay.table[1, :tiles] = replay.table[0 if hit else 1, :tiles]
        replay.done[1] = shared
        other = [(2, neighbour)] if neighbour else []
        out = [replay.attend([(1, sizes[0]), *other])]
        out += [replay.attend([(1, 1), *[(2, 1) for _ in other]], decode=True) for _ in sizes[1:]]
        assert int(replay.state.own_start[2]) == (shared if hit else 0)
        assert all(torch.isfinite(x).all() for x in out)
        outs.append(out)
    for missed, found in zip(*outs, strict=True):
        assert torch.equal(missed, found)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_canonical_output_does_not_depend_on_chunks(case: Case) -> None:
    """Every query sees the same values, so that only the order of sums differs; in the fast mode it doesn't."""

    def relative_distance(*, canonical: bool) -> float:
        config = case.config(canonical=canonical)
        whole = Replay(case, config, 1, seed=0).attend([(0, case.length)]).double()
        chunked = Replay(case, config, 1, seed=0)
        cuts = [37, config.tile_tokens, case.length - config.tile_tokens - 37]
        parts = torch.cat([chunked.attend([(0, n)]) for n in cuts]).double()
        return float((parts - whole).norm() / whole.norm())

    rounding = {torch.float16: 5e-4, torch.bfloat16: 4e-3}[case.dtype]
    assert relative_distance(canonical=True) < rounding
    assert relative_distance(canonical=False) > 2 * rounding
