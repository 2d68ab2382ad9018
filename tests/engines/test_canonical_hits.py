"""Canonical mode, SGLang as it is: what comes from the cache equals what is computed, to the last bit.

Chunks have the length of a page, so that a cold run and a hit run the model on the same numbers of rows. Only a tile
that was decoded differs: the model computed its rows one at a time and not 128 at once, and a CPU's matrix kernels
round those differently. There a tolerance stands; test_canonical_schedules.py removes the cause and asks for equality.
"""

from __future__ import annotations

import pytest
from compare import Record, logprob_difference, same_bits
from engine_process import EngineSetup, Models, run_plan
from plan import Request, Results, Step, alone, flush
from tiny_models import LLAMA_GROUP_3, prompt

TILE = 128
PAGES = 8
RESIDUES = (1, 63, 64, 127, 128, 129, 255, 256, 300)
# The same residues behind two tiles that a hit reads.
LENGTHS = (*RESIDUES, *(2 * TILE + n for n in RESIDUES if n < 2 * TILE), 4 * TILE + 44)
NEW_TOKENS = 4
REPEATS = 4
# One rounding of a K or V row in float32 can move a code by one; the model's answer then moves by about as much as
# quantisation itself moves it. Measured: up to 2e-3.
DECODED_TILE_TOLERANCE = 0.05


def _residues() -> list[Step]:
    steps = []
    for n in LENGTHS:
        steps += [alone(Request(f"{n}/{kind}", prompt(n), NEW_TOKENS)) for kind in ("cold", "hit")]
        steps.append(flush())
    return steps


def _repeats() -> list[Step]:
    return [*(alone(Request(f"repeat/{i}", prompt(300, 1), 12)) for i in range(REPEATS)), flush()]


def _turns() -> list[Step]:
    """Three turns in one cache, and the second and third again in an empty one. Turn 2 decodes over a tile's end."""
    turns = [
        Request("turn/1", prompt(300, 2), 20),
        Request("turn/2", prompt(50, 3), 40, follows="turn/1"),
        Request("turn/3", prompt(100, 4), 8, follows="turn/2"),
    ]
    cold = [
        Request("turn/2/cold", turns[1].tokens, 40, follows="turn/1"),
        Request("turn/3/cold", turns[2].tokens, 8, follows="turn/2"),
    ]
    return [*map(alone, turns), *(step for request in cold for step in (flush(), alone(request))), flush()]


def _eviction() -> list[Step]:
    """Push a prompt out of the tree with others, ask it again, and once more."""
    return [
        alone(Request("evict/first", prompt(300, 5), 6)),
        alone(Request("evict/hit", prompt(300, 5), 6)),
        *(alone(Request(f"evict/other/{i}", prompt(390, 6 + i), 6)) for i in range(3)),
        alone(Request("evict/gone", prompt(300, 5), 6)),
        alone(Request("evict/again", prompt(300, 5), 6)),
    ]


def _full_pool() -> list[Step]:
    """Three requests that fit when they start and not when each needs three pages; first two and one at a time."""
    requests = [(f"full/{i}", prompt(114 + 3 * i, 20 + i)) for i in range(3)]
    calm = [Request(f"{name}/calm", tokens, 150) for name, tokens in requests]
    return [
        *(step for group in (calm[:2], calm[2:]) for step in (flush(), Step(group))),
        flush(),
        Step([Request(name, tokens, 150) for name, tokens in requests]),
    ]


@pytest.fixture(scope="module")
def results(models: Models) -> Results:
    """Run everything on one engine, whose scheduler admits more than its pool will hold."""
    setup = EngineSetup(
        models.path(LLAMA_GROUP_3),
        {"chunked_prefill_size": TILE, "max_total_tokens": PAGES * TILE, "schedule_conservativeness": 0.01},
        {"KVARN_CANONICAL": "1"},
    )
    steps = [*_residues(), *_repeats(), *_turns(), *_eviction(), *_full_pool(), flush()]
    return run_plan(setup, steps, models.scratch("hits"))


@pytest.mark.parametrize("n", LENGTHS)
def test_hit_equals_cold_run_at_every_residue(results: Results, n: int) -> None:
    cold, hit = results[f"{n}/cold"], results[f"{n}/hit"]
    assert cold.cached_tokens == 0
    assert hit.cached_tokens == (n - 1) // TILE * TILE
    same_bits(cold, hit)


def test_every_repeat_of_a_prompt_is_equal(results: Results) -> None:
    first, *others = (results[f"repeat/{i}"] for i in range(REPEATS))
    assert first.cached_tokens == 0
    for other in others:
        assert other.cached_tokens == 2 * TILE
        same_bits(first, other)


def test_second_turn_equals_a_cold_run_when_no_tile_was_decoded(results: Results) -> None:
    assert results["turn/2"].cached_tokens == 2 * TILE
    assert results["turn/2/cold"].cached_tokens == 0
    same_bits(results["turn/2"], results["turn/2/cold"])


def test_third_turn_over_a_decoded_tile_is_close_to_a_cold_run(results: Results, record_property: Record) -> None:
    assert results["turn/3"].cached_tokens == 3 * TILE
    assert results["turn/3/cold"].cached_tokens == 0
    difference = logprob_difference(results["turn/3"], results["turn/3/cold"])
    record_property("decoded tile, largest logprob difference", difference)
    assert difference < DECODED_TILE_TOLERANCE


def test_prompt_is_answered_the_same_before_and_after_its_eviction(results: Results) -> None:
    cached = [results[f"evict/{name}"].cached_tokens for name in ("first", "hit", "gone", "again")]
    assert cached[:2] == [0, 2 * TILE]
    assert cached[2] < 2 * TILE, "the pool is too large for this test: nothing was evicted"
    assert cached[3] == 2 * TILE
    for name in ("hit", "gone", "again"):
        same_bits(results["evict/first"], results[f"evict/{name}"])


def test_full_pool_retracts_requests_and_answers_stay_close(results: Results, record_property: Record) -> None:
    """A request that begins again has its decoded rows prefilled: the tolerance of a decoded tile."""
    names = [f"full/{i}" for i in range(3)]
    retractions = sum(results[name].retractions for name in names)
    differences = [logprob_difference(results[name], results[f"{name}/calm"]) for name in names]
    record_property("full pool, retractions and largest logprob difference", (retractions, max(differences)))
    assert retractions, "the pool is too large for this test: nothing was retracted"
    assert max(differences) < DECODED_TILE_TOLERANCE


def test_chunks_ended_at_pages(results: Results) -> None:
    """What makes bits comparable here: no chunk but a prompt's last ended elsewhere."""
    alone = [chunk for chunk in results.chunks if not chunk.rids[0].startswith("full/")]
    assert len(alone) > 2 * len(LENGTHS)
    for chunk in alone:
        assert len(chunk.rids) == 1
        assert chunk.seq_lens[0] % TILE == 0 or chunk.seq_lens[0] == len(results[chunk.rids[0]].prompt)
        assert chunk.seq_lens[0] - chunk.prefix_lens[0] <= TILE


def test_every_flush_succeeded(results: Results) -> None:
    assert all(results.flushed)
