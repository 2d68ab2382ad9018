"""benchmarks.serving.trail and .parallel: ranks that decide differently are told from ranks that don't."""

import argparse
import json
from dataclasses import asdict

import pytest
import torch

from benchmarks.serving import parallel, trail
from kvarn.core.cache import CacheConfig
from kvarn.core.capacity import cache_shape
from kvarn.core.step import Step
from kvarn.core.table_steps import TableSteps
from kvarn.core.tail import TailState
from kvarn.presets import get_preset

TILE, ROWS, PAGES = 128, 4, 8
PERIOD = 2
ROW = {"tp": 2, "agreement": 0.7, "fp16_agreement": 0.8, "hash_equal": True, "hash_differs_after_steps": None}
ROW |= {"steps": 100, "sealed_tiles": 9, "prefix_hits": 3}


class Rank:
    """What one rank's scheduler tells, and what was hashed of it."""

    def __init__(self) -> None:
        shape = cache_shape(get_preset("kvarn_k4v2_g128"), layers=1, kv_heads=1, head_dim=64, raw_bytes=4)
        state = TailState(CacheConfig.of(shape), ROWS, ROWS * PAGES + 1, ROWS, "cpu")
        self.slots = torch.arange(TILE, TILE + ROWS * PAGES * TILE, dtype=torch.int32).view(ROWS, PAGES * TILE)
        self.steps = TableSteps(state, [], self.slots, 1, None)
        self.trail = trail.Trail(state.config, "cpu", PERIOD)

    def add(self, step: Step) -> None:
        self.trail.add(step, step.rows[None])

    def chunk(self, row: int, prefix: int, end: int) -> None:
        at = torch.tensor([row])
        self.add(self.steps.ragged(at, torch.tensor([prefix]), torch.tensor([end]), [prefix], [end - prefix], ["r"]))

    def decode(self, ends: dict[int, int], padding: int = 0) -> None:
        rows, lengths = [*ends, *[0] * padding], [*ends.values(), *[1] * padding]
        step = self.steps.uniform(torch.tensor(rows), torch.tensor(lengths), 1)
        step.block_table[len(ends) :] = 0
        self.add(step)

    def run(
        self, *, page: int | None = None, hit: bool = False, padding: int = 0, last: int = TILE * 2
    ) -> trail.Report:
        if page is not None:
            self.slots[1, TILE : 2 * TILE] = page * TILE + torch.arange(TILE)
        self.chunk(1, TILE if hit else 0, 2 * TILE - 2)
        for end in range(2 * TILE - 1, last + 1):
            self.decode({1: end}, padding)
        return self.trail.read()


def test_ranks_that_decide_the_same_have_the_same_trail():
    reports = [Rank().run(), Rank().run()]
    assert reports[0] == reports[1]
    assert (reports[0].steps, len(reports[0].hashes), reports[0].sealed, reports[0].hits) == (3, 2, 2, 0)
    assert trail.first_difference(reports) is None


@pytest.mark.parametrize(
    "other",
    [{"page": 30}, {"hit": True}, {"last": TILE * 2 - 1}, {"last": TILE * 2 + 1}],
    ids=["another page is sealed", "a prefix was found", "a step fewer", "a step more"],
)
def test_a_rank_that_decides_otherwise_is_found(other):
    assert trail.first_difference([Rank().run(), Rank().run(**other)]) is not None


def test_the_first_period_that_differs_is_told():
    one, two = Rank(), Rank()
    for rank, last in ((one, 3), (two, 2)):
        rank.chunk(0, 0, TILE - 4)
        for end in (1, 2, last):
            rank.decode({0: TILE - 4 + end})
    assert trail.first_difference([one.trail.read(), two.trail.read()]) == 1


def test_padding_of_a_graph_does_not_count():
    assert trail.first_difference([Rank().run(), Rank().run(padding=2)]) is None
    empty = Rank()
    empty.decode({}, padding=2)
    assert asdict(empty.trail.read()) == {"steps": 0, "hashes": [], "sealed": 0, "hits": 0}


def test_order_of_steps_counts():
    one, two = Rank(), Rank()
    one.chunk(0, 0, 10)
    one.chunk(1, 0, 20)
    two.chunk(1, 0, 20)
    two.chunk(0, 0, 10)
    assert trail.first_difference([one.trail.read(), two.trail.read()]) == 0


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({}, 0),
        ({"agreement": 0.6}, 1),
        ({"hash_equal": False, "hash_differs_after_steps": 0}, 1),
        ({"steps": 99}, 1),
        ({"sealed_tiles": 0}, 1),
        ({"prefix_hits": 0}, 1),
    ],
)
def test_a_row_is_judged(change, reasons):
    assert len(parallel.faults(ROW | change, steps=100, tolerance=0.15)) == reasons


def test_a_row_compares_ranks_with_one_gpu():
    args = argparse.Namespace(engine="e", model="folder/m", model_dtype="float16", tp=2, dtype="kvarn_k4v2_g128")
    args.prompts, args.new_tokens = 2, 4
    report = asdict(trail.Report(steps=5, hashes=[3], sealed=2, hits=1))
    alone = {"greedy": [[1, 2, 3, 4], [5, 6, 7, 8]], "greedy_again": [[1, 2, 3, 4], [5, 6, 7, 8]], "kv_tokens": 50}
    together = {"greedy": [[1, 2, 3, 4], [5, 0, 7, 8]], "kv_tokens": 40, "traffic": [report, report]}
    exact = {"greedy": alone["greedy"], "kv_tokens": 10}
    found = {(args.dtype, 1): alone, (args.dtype, 2): together, ("auto", 1): alone, ("auto", 2): exact}
    row = parallel.row_of(args, found)
    assert (row["equal"], row["fp16_equal"], row["first_divergence_median"], row["agreement"]) == (1, 2, 2.5, 0.625)
    assert (row["hash_equal"], row["steps"], row["capacity_ratio"]) == (True, 5, 4.0)
    together["traffic"] = [report, {**report, "hashes": [4]}]
    assert not parallel.row_of(args, found)["hash_equal"]
    json.dumps(row)
