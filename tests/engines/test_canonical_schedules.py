"""Canonical mode with every row computed by itself: no schedule changes an answer, to the last bit.

A CPU's matrix kernels round differently for different numbers of rows, so SGLang's scheduler runs here with
``ENGINE_TEST_ROWWISE`` (instruments.py). What is left to differ is what KVarN answers for: which rows a query reads,
whether from a record or raw, and what the records hold.
"""

from __future__ import annotations

import pytest
import storm
from compare import Record, same_bits
from drafting import without_drafts
from engine_process import EngineSetup, Models, run_plan
from plan import Answer, Request, Results, Step, alone, flush
from tiny_models import QWEN3_GROUP_2, prompt

TILE = 128
PAGES = 10
CHUNK = 256
NEEDLE_BATCHES = (1, 2, 4, 8)
RETRACTED = 3
RETRACT_EVERY_STEPS = 11
# With its answer it needs all pages but the one that SGLang keeps in reserve; if one had leaked, it would never start.
WHOLE_POOL = (PAGES - 2) * TILE


def _turns() -> list[Step]:
    """Turns whose tiles are partly prefilled, partly decoded, each again in an empty cache."""
    turns = [
        Request("turn/1", prompt(200, 2), 80),
        Request("turn/2", prompt(60, 3), 130, follows="turn/1"),
        Request("turn/3", prompt(90, 4), 12, follows="turn/2"),
    ]
    cold = [Request(f"{turn.name}/cold", turn.tokens, turn.new_tokens, follows=turn.follows) for turn in turns[1:]]
    return [*map(alone, turns), *(step for request in cold for step in (flush(), alone(request))), flush()]


def _mixed_chunks() -> list[Step]:
    """A prompt whose chunks carry the decode row of a running request, then a hit on what those chunks sealed."""
    runs, late = prompt(100, 10), prompt(700, 11)
    return [
        alone(Request("runs/alone", runs, 40)),
        alone(Request("late/alone", late, 10)),
        flush(),
        Step(
            [
                Request("runs/mixed", runs, 40, logprobs=False),
                Request("late/mixed", late, 10, starts_after=("runs/mixed", 4), logprobs=False),
            ]
        ),
        alone(Request("runs/hit", runs, 40)),
        alone(Request("late/hit", late, 10)),
        flush(),
    ]


def _needle() -> list[Step]:
    """One request among others, in batches of several sizes, all of them sent at once into an empty cache."""
    needle = prompt(150, 12)
    steps = []
    for size in NEEDLE_BATCHES:
        others = [Request(f"straw/{size}/{i}", prompt(20 + 37 * i, 30 + i), 12) for i in range(size - 1)]
        steps += [Step([*others[::2], Request(f"needle/{size}", needle, 12), *others[1::2]]), flush()]
    return steps


def _retraction() -> list[Step]:
    """Requests each by itself, which SGLang never retracts, then together."""
    requests = [(f"retract/{i}", prompt(117 + 100 * i, 40 + i)) for i in range(RETRACTED)]
    return [
        *(step for name, tokens in requests for step in (alone(Request(f"{name}/alone", tokens, 40)), flush())),
        Step([Request(name, tokens, 40) for name, tokens in requests]),
        flush(),
    ]


def _storm() -> list[Step]:
    """References, the storm over what they left in the cache, then a request that needs every page of the pool."""
    whole_pool = prompt(WHOLE_POOL, 50)
    return [
        alone(Request("whole/before", whole_pool, 20)),
        flush(),
        *storm.references(),
        storm.storm(seed=1),
        alone(Request("whole/after", whole_pool, 20)),
        flush(),
    ]


def run_schedules(models: Models) -> Results:
    """Run everything on one engine, once in a test session.

    Every so many steps it takes its pages from a running request, if it runs two.
    """
    setup = EngineSetup(
        models.path(QWEN3_GROUP_2),
        {
            "chunked_prefill_size": CHUNK,
            "max_total_tokens": PAGES * TILE,
            "enable_mixed_chunk": True,
        },
        {
            "KVARN_CANONICAL": "1",
            "ENGINE_TEST_ROWWISE": "1",
            "SGLANG_TEST_RETRACT": "1",
            "SGLANG_TEST_RETRACT_INTERVAL": str(RETRACT_EVERY_STEPS),
        },
    )
    steps = [*without_drafts(), *_turns(), *_mixed_chunks(), *_needle(), *_retraction(), *_storm()]
    return run_plan(setup, steps, models.scratch("schedules"))


@pytest.fixture(scope="module")
def results(models: Models) -> Results:
    return run_schedules(models)


@pytest.mark.parametrize(("turn", "cached"), [(2, 2 * TILE), (3, 3 * TILE)])
def test_turn_over_decoded_tiles_equals_a_cold_run(results: Results, turn: int, cached: int) -> None:
    assert results[f"turn/{turn}"].cached_tokens == cached
    assert results[f"turn/{turn}/cold"].cached_tokens == 0
    same_bits(results[f"turn/{turn}"], results[f"turn/{turn}/cold"])


def test_chunk_ended_inside_a_tile_beside_a_decode_row(results: Results) -> None:
    """What the next test rests on."""
    mixed = [chunk for chunk in results.chunks if {"runs/mixed", "late/mixed"} <= set(chunk.rids)]
    ends = {end for chunk in mixed for rid, end in zip(chunk.rids, chunk.seq_lens, strict=True) if rid == "late/mixed"}
    assert 3 * TILE - 1 in ends
    assert any(
        end - start == 1 and start % TILE
        for chunk in mixed
        for rid, start, end in zip(chunk.rids, chunk.prefix_lens, chunk.seq_lens, strict=True)
        if rid == "runs/mixed"
    )


@pytest.mark.parametrize("name", ["runs", "late"])
def test_mixed_chunks_change_neither_answer_nor_what_they_leave_in_the_cache(results: Results, name: str) -> None:
    assert results[f"{name}/mixed"].output_ids == results[f"{name}/alone"].output_ids
    same_bits(results[f"{name}/hit"], results[f"{name}/alone"])


def test_tiles_of_mixed_chunks_were_hit(results: Results) -> None:
    assert results["late/hit"].cached_tokens == 5 * TILE


@pytest.mark.parametrize("size", NEEDLE_BATCHES[1:])
def test_request_in_a_batch_equals_the_request_alone(results: Results, size: int) -> None:
    same_bits(results[f"needle/{size}"], results["needle/1"])


def test_retracted_requests_equal_themselves_alone(results: Results, record_property: Record) -> None:
    names = [f"retract/{i}" for i in range(RETRACTED)]
    record_property("retractions, of these requests", sum(results[name].retractions for name in names))
    record_property("retractions, in all", sum(answer.retractions for answer in results.answers.values()))
    assert any(results[name].retractions for name in names)
    for name in names:
        assert results[f"{name}/alone"].retractions == 0
        same_bits(results[name], results[f"{name}/alone"])


def test_survivors_of_an_abort_storm_equal_themselves_alone(results: Results, record_property: Record) -> None:
    survivors = storm.survivors(results)
    aborted = [answer for answer in results.answers.values() if answer.finish == "abort"]
    record_property("aborted, and survivors", (len(aborted), len(survivors)))
    assert len(aborted) + len(survivors) == storm.REQUESTS
    assert len(aborted) >= storm.ABORTED - 2
    for name, reference in survivors:
        assert results[name].bits == _beginning(results[reference], len(results[name].output_ids))


def test_aborts_hit_the_queue_and_decoding(results: Results) -> None:
    tokens = [len(answer.output_ids) for answer in results.answers.values() if answer.finish == "abort"]
    assert min(tokens) == 0
    assert max(tokens) > 1


def test_every_page_is_free_after_the_storm(results: Results) -> None:
    """SGLang audits its pools in every step here and stops at a leak; this needs all pages before any flush."""
    same_bits(results["whole/after"], results["whole/before"])


def test_every_flush_succeeded(results: Results) -> None:
    assert all(results.flushed)


def _beginning(answer: Answer, tokens: int) -> tuple[list[int], list[float]]:
    return answer.output_ids[:tokens], answer.logprobs[:tokens]
