"""The same schedules through the real writes, seals and attention of a layer in poisoned memory.

Every record must be, byte for byte, the one that its tile gets alone in a clean cache, and every output what the rows
and records of the request's own tokens give. On the torch references, and on the Triton kernels where there is a GPU.
KVARN_LIFECYCLE_REAL_STEPS (100; 2000 on a GPU) is the number of forward passes of each setting.
"""

import functools
import os
from collections.abc import Sequence

import pytest
import torch
from lifecycle_driver import Driver
from lifecycle_engine import Request
from lifecycle_world import GROUP, SETTINGS, TILE, Setting, World

from kvarn.core.append import RotatedRows, rotate_rows
from kvarn.core.attention import attention
from kvarn.core.cache import CacheConfig, allocate_layer
from kvarn.core.chunk_step import chunk_step
from kvarn.core.hadamard import rotate, rotate_keys
from kvarn.core.reference import decode_record, softmax_attention
from kvarn.core.seal import seal
from kvarn.core.step import Step, record_end
from kvarn.core.tail import TailState, owner_tags

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = int(os.environ.get("KVARN_LIFECYCLE_REAL_STEPS", "2000" if DEVICE == "cuda" else "100"))
DTYPE = torch.float16
HEAD_DIM = 64
SCALE = 0.11
NAN = float("nan")
# fp16 keeps 11 bits of output and of softmax weights.
RMS, LARGEST = 2e-3, 2e-2

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@functools.lru_cache(maxsize=1 << 14)
def rows_of(tag: int) -> Rows:
    """Query, key and value of a token: a function of the sequence up to it."""
    generator = torch.Generator().manual_seed(tag & (1 << 62) - 1)
    qkv = torch.randn(GROUP + 2, HEAD_DIM, generator=generator).to(DTYPE)
    return qkv[:GROUP], qkv[GROUP:-1], qkv[-1:]


def stack(tags: Sequence[int]) -> Rows:
    return tuple(torch.stack(x).to(DEVICE) for x in zip(*map(rows_of, tags), strict=True))


class CleanLayer:
    """What a tile or a row becomes alone, in a cache that nothing else was ever written to."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self._records: dict[int, torch.Tensor] = {}

    def rotated(self, tags: Sequence[int]) -> RotatedRows:
        return self._fresh(tags)[0]

    def record(self, tags: Sequence[int]) -> torch.Tensor:
        """The record of one tile, [kv_heads, record_bytes]."""
        if tags[-1] not in self._records:
            rotated, layer, step = self._fresh(tags)
            seal(rotated, layer, step)
            self._records[tags[-1]] = layer.records[layer.pages_of(1)].clone()
        return self._records[tags[-1]]

    def _fresh(self, tags: Sequence[int]) -> tuple[RotatedRows, object, Step]:
        layer = allocate_layer(self.config, 2, 2, 0, DTYPE, DEVICE)
        state = TailState(self.config, 2, 2, 0, DEVICE)
        one, zero, length = (torch.tensor([n], dtype=torch.int32, device=DEVICE) for n in (1, 0, len(tags)))
        table = torch.ones(1, -(-len(tags) // TILE), dtype=torch.int32, device=DEVICE)
        step, _ = chunk_step(state, one, zero, length, owner_tags(["x"]).to(DEVICE), table, GROUP, len(tags))
        return rotate_rows(*stack(tags)[1:], layer, step, store=False), layer, step


class LiveWorld(World):
    """A world whose every step also runs on a real layer."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, device=DEVICE)
        self.layer = allocate_layer(self.config, setting.pages, setting.rows, setting.sink_slots, DTYPE, DEVICE)
        self.layer.tails.fill_(NAN)
        self.clean = CleanLayer(self.config)
        self.records_checked = 0

    def _run(self, step: Step, batch: Sequence[tuple[Request, int]], padding: int) -> None:
        self.poison_free_memory()
        q, k, v = stack([tag for r, n in batch for tag in r.tags[r.computed : r.computed + n]])
        padded = [torch.cat((x, torch.full_like(x[:1], NAN).expand(padding, -1, -1))) for x in (q, k, v)]
        out = attention(*padded, self.layer, step, SCALE)
        begin = 0
        for i, (request, count) in enumerate(batch):
            self.check_records(request, count)
            self.check_output(step, i, request, out[begin : begin + count])
            begin += count
        super()._run(step, batch, padding)

    def poison_free_memory(self) -> None:
        """NaN in records of free pages and in sinks of slots that are free or whose page is."""
        free_pages = list(self.engine.free_pages)
        self.layer.records[self.layer.pages_of(torch.tensor(free_pages, dtype=torch.int64))] = 0xFF
        slots = self.state.page_slot[free_pages]
        free = self.state.free_slots[: int(self.state.free_count)]
        self.layer.sinks[torch.cat((slots[slots >= 0], free)).long()] = NAN

    def check_records(self, request: Request, count: int) -> None:
        for tile in range(request.computed // TILE, (request.computed + count) // TILE):
            page = self.engine.table[request.row][tile]
            alone = self.clean.record(request.tags[tile * TILE : (tile + 1) * TILE])
            assert torch.equal(self.layer.records[self.layer.pages_of(page)], alone), (
                f"record of tile {tile} of {request.rid}"
            )
            self.records_checked += 1

    def check_output(self, step: Step, i: int, request: Request, out: torch.Tensor) -> None:
        """Compare with float64 attention over the request's own tokens, each restored or raw as the read rule says."""
        count = out.shape[0]
        length = request.computed + count
        position = torch.arange(request.computed, length, dtype=torch.int32, device=DEVICE)
        ends = record_end(self.config, step, torch.full_like(position, i, dtype=torch.int64), position)
        tiles = int(ends.max()) // TILE
        sinks = self.config.sink_tokens if int(step.sink_slots[i]) >= 0 else 0
        raw = self.clean.rotated(request.tags[:length])
        records = [self.clean.record(request.tags[t * TILE : (t + 1) * TILE]) for t in range(tiles)]
        kv = [raw.k, raw.v]
        if tiles:
            restored = decode_record(torch.stack(records), self.config.layout)
            kv = [torch.cat((x, y.transpose(1, 2).flatten(0, 1).to(DEVICE))) for x, y in zip(kv, restored, strict=True)]
        at = torch.arange(length, device=DEVICE)
        is_raw = (at >= ends[:, None]) | (at < sinks)
        visible = torch.cat((is_raw, ~is_raw[:, : tiles * TILE]), dim=1)
        visible &= torch.cat((at, at[: tiles * TILE])) <= position[:, None]
        q = rotate_keys(stack(request.tags[request.computed : length])[0].double())
        want, _ = softmax_attention(q, *(x.double() for x in kv), visible, SCALE)
        off = out.double() - rotate(want, inverse=True)
        norm = want.square().mean().sqrt()
        assert off.square().mean().sqrt() < RMS * norm, f"output of {request.rid} at {length}"
        assert off.abs().max() < LARGEST * norm, f"output of {request.rid} at {length}"


@pytest.mark.timeout(0)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_real_layer_holds_and_reads_what_the_oracle_says(setting: Setting) -> None:
    world = LiveWorld(setting)
    Driver(world, 5).run(STEPS)
    assert world.records_checked >= STEPS // 10
    assert world.counts["hits"] and world.counts["page reuse"] and world.counts["mixed batches"]


def test_one_stale_row_of_a_ring_is_noticed() -> None:
    """A ring row of another token, well inside the exact tail, moves the output by more than the tolerance."""
    world = LiveWorld(SETTINGS["tail-64-sinks-4"])
    request = world.engine.submit("first", [1] * 70)
    world.admit(request)
    world.chunk([(request, 70)])
    world.layer.tails[request.row, :, :, 68] = world.layer.tails[request.row, :, :, 3]
    with pytest.raises(AssertionError, match="output of first"):
        world.decode([request])
