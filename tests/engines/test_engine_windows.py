"""A model of which half the layers have a sliding window: they keep the model's dtype, in a pool of SGLang's own.

With an exact tail longer than the context a cold run reads no record, so its tokens equal those of transformers; a hit
reads records in the layers that attend to all tokens, and rows of the model's dtype in the others.
"""

from __future__ import annotations

import pytest
from compare import Record, divergence, is_finite, logprob_difference
from engine_process import EngineSetup, Models, run_plan
from plan import Request, Results, Step, alone, flush
from tiny_models import REFERENCE_LENGTHS, TALKATIVE, WINDOW, prompt
from workloads import conversation_warm_and_cold, reference_prompts

TILE = 128
PAGES = 12
# A hit ends where pages do, and needs the window before its end.
HITS = {300: 256, 530: 512}
TURNS = 3
FILLED, CROWD, CROWD_TOKENS = 4, 4, 60
# As in test_default_mode; measured here: up to 1.5e-4.
PRESET = "kvarn_k8v4_g128"
LARGEST_DIVERGENCE = 0.005
# Of log probabilities, in float32.
ROUNDING = 1e-4


def _full_pool() -> list[Step]:
    """More prompts than the pool holds, the first of them again; then more at once than it holds."""
    filled = [alone(Request(f"filled/{i}", prompt(500, 100 + i), 8)) for i in range(FILLED)]
    crowd = [Request(f"crowd/{i}", prompt(350, 200 + i), CROWD_TOKENS) for i in range(CROWD)]
    by_itself = Request("crowd/0/alone", crowd[0].tokens, CROWD_TOKENS)
    return [*filled, alone(Request("filled/again", prompt(500, 100), 8)), Step(crowd), flush(), alone(by_itself)]


@pytest.fixture(scope="module")
def results(models: Models) -> Results:
    options = {"kv_cache_dtype": PRESET, "chunked_prefill_size": 256, "max_total_tokens": PAGES * TILE}
    setup = EngineSetup(models.folder / TALKATIVE, options, {"KVARN_TAIL_TOKENS": "1024"})
    steps = [*reference_prompts(HITS), *conversation_warm_and_cold(TURNS), *_full_pool()]
    return run_plan(setup, steps, models.scratch("windows"))


def test_banner_tells_how_layers_are_kept(results: Results) -> None:
    assert "layers: 2 in tiles, 2 in model dtype" in results.log


@pytest.mark.parametrize("kind", ["cold", "together"])
def test_greedy_tokens_equal_those_of_transformers(results: Results, models: Models, kind: str) -> None:
    assert max(REFERENCE_LENGTHS) > 2 * WINDOW
    for n, reference in zip(REFERENCE_LENGTHS, models.references[TALKATIVE], strict=True):
        assert results[f"{n}/{kind}"].output_ids == reference, f"prompt of {n} tokens"


def test_hit_differs_from_a_cold_run_by_what_quantisation_costs(results: Results, record_property: Record) -> None:
    divergences = [divergence(results[f"{n}/hit"], results[f"{n}/cold"]) for n in HITS]
    record_property("windows, hit and cold run, KL divergence of the first token", divergences)
    assert {n: results[f"{n}/hit"].cached_tokens for n in HITS} == HITS
    assert 0 < max(divergences) < LARGEST_DIVERGENCE


def test_turns_differ_from_cold_runs_by_no_more(results: Results, record_property: Record) -> None:
    turns = range(1, TURNS)
    divergences = [divergence(results[f"turn/{i}"], results[f"turn/{i}/cold"]) for i in turns]
    record_property("windows, turns and cold runs, KL divergence of the first token", divergences)
    assert all(results[f"turn/{i}"].cached_tokens > 0 for i in turns)
    assert all(results[f"turn/{i}/cold"].cached_tokens == 0 for i in turns)
    assert max(divergences) < LARGEST_DIVERGENCE


def test_evicted_prompt_is_computed_anew(results: Results) -> None:
    again, first = results["filled/again"], results["filled/0"]
    assert again.cached_tokens == 0
    assert logprob_difference(again, first) < ROUNDING


def test_request_in_a_full_pool_equals_the_request_alone(results: Results) -> None:
    assert logprob_difference(results["crowd/0"], results["crowd/0/alone"]) < ROUNDING


def test_every_request_ends_with_finite_answers(results: Results) -> None:
    assert all(answer.finish == "length" and is_finite(answer) for answer in results.answers.values())
    assert all(results.flushed)
