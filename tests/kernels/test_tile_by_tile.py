"""Where a row's bits may depend on nothing but its request, chunks are served tile by tile, as decode would."""

from collections.abc import Callable

import pytest
import torch
from cases import poisoned_layer

from kvarn.core import tile_by_tile as tile_by_tile_module
from kvarn.core.attention import attention
from kvarn.core.cache import CacheConfig, LayerCache
from kvarn.core.chunk_step import chunk_step
from kvarn.core.latent.attend import latent_shape
from kvarn.core.latent.attention import latent_attention
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.rows import LatentRows
from kvarn.core.layout import TileLayout
from kvarn.core.step import Step, verify_step
from kvarn.core.tail import TailState, owner_tags
from kvarn.presets import get_preset

TILE, GROUP, LENGTH, DRAFTS = 64, 2, 100, 3

# Steps of two requests, the first of which gets LENGTH rows: how many each adds; "verify" for rows that a decode step
# or one with drafts adds.
WAYS = {
    "inside tiles": [(40, 0), (60, 0)],
    "decoded": [(85, 0), *[(1, "verify")] * 15],
    "verified": [(80, 0), *[(4, "verify")] * 5],
    "beside another's chunks": [(70, 9), (20, 50), *[(1, 3)] * 10],
    "at the edges of tiles": [(63, 0), (2, 0), (35, 0)],
}
Attend = Callable[[LayerCache, Step, torch.Tensor], torch.Tensor]


class Server:
    """Two requests over a cache full of NaN. They have the same rows, numbered by position."""

    def __init__(self, config: CacheConfig, attend: Attend, group: int, widest: int, device: str) -> None:
        tiles = -(-LENGTH // TILE)
        self.layer = poisoned_layer(config, 1 + 2 * tiles, 3, 1, torch.float16, device, pad=0)
        self.state = TailState(config, 3, 1 + 2 * tiles, 1, device)
        self.table = torch.tensor([[4, 2], [1, 3]], dtype=torch.int32, device=device)
        self.rings = torch.tensor([2, 1], dtype=torch.int32, device=device)
        self.tags = owner_tags(["first", "second"]).to(device)
        self.attend, self.group, self.widest, self.device = attend, group, widest, device
        self.done = [0, 0]

    def step(self, new: tuple[int, int]) -> torch.Tensor:
        """Serve a step of chunks; return the first request's rows of its output."""
        ends = [a + b for a, b in zip(self.done, new, strict=True)]
        step, _ = chunk_step(
            self.state, self.rings, self.ints(self.done), self.ints(ends), self.tags, self.table, self.group, sum(new),
            widest=self.widest,
        )  # fmt: skip
        at = [p for begin, end in zip(self.done, ends, strict=True) for p in range(begin, end)]
        self.done = ends
        return self.attend(self.layer, step, torch.tensor(at, device=self.device))[: new[0]]

    def verify(self, rows: int) -> torch.Tensor:
        """Serve a step of so many rows of the first request."""
        begin, self.done[0] = self.done[0], self.done[0] + rows
        step = verify_step(
            self.state, self.rings[:1], self.ints(self.done[:1]), self.table[:1], self.group, rows, self.widest
        )
        return self.attend(self.layer, step, torch.arange(begin, self.done[0], device=self.device))

    def ints(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def serve(self, way: list[tuple]) -> torch.Tensor:
        """Serve all steps; return the first request's output."""
        return torch.cat([self.verify(a) if b == "verify" else self.step((a, b)) for a, b in way])

    def kept(self) -> list[torch.Tensor]:
        """Return the first request's records and ring."""
        full = self.table[0, : LENGTH // TILE].long()
        ring = torch.arange(LENGTH // TILE * TILE, LENGTH, device=self.device) % self.layer.config.ring_tokens
        return [self.layer.records[full], self.layer.tails[2][:, :, ring].contiguous().view(torch.uint8)]


def dense(device: str) -> Server:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(LENGTH, n, 64, generator=generator).half().to(device) for n in (GROUP, 1, 1))
    config = CacheConfig(TileLayout.of(get_preset("kvarn_k4v2_g64"), 64), 1, 0, 0, TILE + DRAFTS, True, True, 1, DRAFTS)
    return Server(config, lambda layer, step, at: attention(q[at], k[at], v[at], layer, step, 0.1), GROUP, 16, device)


def latent(device: str) -> Server:
    generator = torch.Generator().manual_seed(0)
    heads, numbers = 2, (128, 64)
    q = [torch.randn(LENGTH, heads, n, generator=generator).half().to(device) for n in numbers]
    rows = [torch.randn(LENGTH, n, generator=generator).half().to(device) for n in numbers]
    config = CacheConfig(LatentLayout(*numbers, TILE, 4, 16), 1, 0, 0, TILE + DRAFTS, True, True, 1, DRAFTS)

    def attend(layer: LayerCache, step: Step, at: torch.Tensor) -> torch.Tensor:
        return latent_attention(q[0][at], q[1][at], LatentRows(rows[0][at], rows[1][at]), layer, step, 0.1)

    return Server(config, attend, *latent_shape(config.layout, heads, torch.device(device)), device)


@pytest.mark.parametrize("made", [dense, latent])
def test_a_row_gets_the_same_bits_by_any_steps(made, device):
    whole = made(device)
    want = whole.serve([(LENGTH, 0)])
    assert want.isfinite().all()
    quick = device == "cpu" and made is latent  # the interpreter is slow
    for name in ("inside tiles", "verified") if quick else WAYS:
        way, server = WAYS[name], made(device)
        got = server.serve(way)
        assert server.done[0] == LENGTH
        assert torch.equal(got, want), name
        for ours, theirs in zip(server.kept(), whole.kept(), strict=True):
            assert torch.equal(ours, theirs), name


def test_a_request_may_hit_what_another_fills_in_the_same_step(device):
    alone, server = dense(device), dense(device)
    want = alone.serve([(LENGTH, 0)])
    server.table[0, 0] = server.table[1, 0]  # published before it is filled
    server.done[0] = TILE
    got = server.step((LENGTH - TILE, TILE))
    assert torch.equal(got, want[TILE:])


def test_parts_follow_the_rings_that_a_step_is_given(device):
    server = dense(device)
    step, _ = chunk_step(
        server.state, server.rings, server.ints([0, 0]), server.ints([70, 9]), server.tags, server.table, GROUP, 79
    )
    assert [part.tokens.tolist() for part in step.parts] == [[*range(64), *range(70, 79)], [*range(64, 70)]]
    other = step.with_rings(server.ints([7, 8]))
    assert [part.step.rows.tolist() for part in other.parts] == [[7, 8], [7]]
    assert [part.step.rows.tolist() for part in step.parts] == [[2, 1], [2]]


def test_parts_of_long_contexts_have_fewer_rows(device, monkeypatch):
    want = dense(device).serve([(LENGTH, 0)])
    monkeypatch.setattr(tile_by_tile_module, "_PART_UNITS", 60)
    server = dense(device)
    step, _ = chunk_step(
        server.state, server.rings, server.ints([0, 0]), server.ints([70, 9]), server.tags, server.table, GROUP, 79
    )
    assert [part.tokens.tolist() for part in step.parts] == [
        [*range(60)], [*range(70, 79)], [*range(60, 64)], [*range(64, 70)]
    ]  # fmt: skip
    assert torch.equal(dense(device).serve([(LENGTH, 0)]), want)


@pytest.mark.parametrize(("canonical", "batch_invariant"), [(True, False), (False, True)])
def test_other_modes_serve_chunks_whole(canonical, batch_invariant, device):
    layout, tail = TileLayout.of(get_preset("kvarn_k4v2_g64"), 64), 0 if canonical else TILE
    config = CacheConfig(layout, 1, tail, 0, TILE + tail, canonical, batch_invariant)
    state = TailState(config, 2, 4, 1, device)
    at = [torch.tensor([n], dtype=torch.int32, device=device) for n in (1, 0, 130)]
    table = torch.tensor([[1, 2, 3]], dtype=torch.int32, device=device)
    step, _ = chunk_step(state, *at, owner_tags(["one"]).to(device), table, GROUP, 130)
    assert step.parts == ()
