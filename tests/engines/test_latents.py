"""Multi-head latent attention: latents in tiles, read with absorbed weights.

With an exact tail longer than the context a cold run reads no record, so its tokens equal those of transformers; a hit
reads records.
"""

from __future__ import annotations

import pytest
from compare import Record, divergence, is_finite
from engine_process import EngineSetup, Models, run_plan
from plan import Request, Results, Step, alone, flush
from tiny_models import LATENT, LATENT_DIM, REFERENCE_LENGTHS, ROPE_DIM
from workloads import conversation, reference_prompts

# A hit ends where pages do.
HITS = {128: 0, 300: 256, 530: 512}
PRESET = "kvarn_k8v4_g128"
# Of the first token, nats; latents of 8 bits.
LARGEST_DIVERGENCE = 0.005
TURNS = 3


def _steps() -> list[Step]:
    """Each prompt by itself, again as a hit, all at once; a conversation in one cache, its last turn again cold."""
    turns = conversation(TURNS)
    cold = Request("cold turn", turns[-1].tokens, 8, turns[-1].follows, distribution=True)
    return [*reference_prompts(HITS), *map(alone, turns), flush(), alone(cold)]


@pytest.fixture(scope="module")
def results(models: Models) -> Results:
    options = {"kv_cache_dtype": PRESET, "chunked_prefill_size": 256}
    setup = EngineSetup(models.folder / LATENT, options, {"KVARN_TAIL_TOKENS": "1024"})
    return run_plan(setup, _steps(), models.scratch("latents"))


def test_banner_tells_the_format_of_latents(results: Results) -> None:
    assert f"l8r16g128d{LATENT_DIM}+{ROPE_DIM}" in results.log


@pytest.mark.parametrize("kind", ["cold", "together"])
def test_greedy_tokens_equal_those_of_transformers(results: Results, models: Models, kind: str) -> None:
    for n, reference in zip(REFERENCE_LENGTHS, models.references[LATENT], strict=True):
        assert results[f"{n}/{kind}"].output_ids == reference, f"prompt of {n} tokens"


def test_hit_differs_from_a_cold_run_by_what_quantisation_costs(results: Results, record_property: Record) -> None:
    divergences = [divergence(results[f"{n}/hit"], results[f"{n}/cold"]) for n in HITS]
    divergences.append(divergence(results[f"turn/{TURNS - 1}"], results["cold turn"]))
    record_property("latents, hit and cold run, KL divergence of the first token", divergences)
    assert {n: results[f"{n}/hit"].cached_tokens for n in HITS} == HITS
    assert results[f"turn/{TURNS - 1}"].cached_tokens > 0
    assert 0 < max(divergences) < LARGEST_DIVERGENCE


def test_every_answer_is_finite(results: Results) -> None:
    assert all(is_finite(answer) for answer in results.answers.values())
    assert all(results.flushed)
