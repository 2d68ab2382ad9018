"""Multi-head latent attention: latents in tiles, read with absorbed weights or, in steps of long chunks, expanded.

With an exact tail longer than the context a cold run reads no record, so its tokens equal those of transformers; a hit
reads records.
"""

from __future__ import annotations

import pytest
from compare import Record, divergence, is_finite, same_bits
from engine_process import EngineSetup, Models, run_plan
from plan import Request, Results, Step, alone, flush
from tiny_models import LATENT, LATENT_DIM, REFERENCE_LENGTHS, ROPE_DIM, prompt
from workloads import conversation, reference_prompts

from kvarn.core.prefill_plan import LONG_ROWS

# A hit ends where pages do.
HITS = {128: 0, 300: 256, 530: 512}
PRESET = "kvarn_k8v4_g128"
# Of the first token, nats; latents of 8 bits.
LARGEST_DIVERGENCE = 0.005
TURNS = 3
CHUNK = 256
# Prompts of which one gets its chunks while the other runs.
MIXED = {"runs": 100, "late": 700}


def _steps() -> list[Step]:
    """Each prompt by itself, again as a hit, all at once; a conversation, its last turn again cold; a mixed batch."""
    turns = conversation(TURNS)
    cold = Request("cold turn", turns[-1].tokens, 8, turns[-1].follows, distribution=True)
    runs, late = (prompt(length, seed=80 + length) for length in MIXED.values())
    mixed = [
        *(Step([Request(f"{name}/alone", prompt(length, seed=80 + length), 40)]) for name, length in MIXED.items()),
        flush(),
        Step(
            [
                Request("runs/mixed", runs, 40, logprobs=False),
                Request("late/mixed", late, 40, starts_after=("runs/mixed", 4), logprobs=False),
            ]
        ),
    ]
    return [*reference_prompts(HITS), *map(alone, turns), flush(), alone(cold), flush(), *mixed, flush()]


@pytest.fixture(scope="module")
def results(models: Models) -> Results:
    options = {"kv_cache_dtype": PRESET, "chunked_prefill_size": CHUNK, "enable_mixed_chunk": True}
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


def test_steps_of_long_chunks_attend_to_expanded_keys(results: Results) -> None:
    expanded: dict[str, int] = {"fresh": 0, "over a prefix": 0, "over a hit": 0, "beside a decode row": 0}
    for chunk in results.chunks:
        rows = [end - begin for begin, end in zip(chunk.prefix_lens, chunk.seq_lens, strict=True)]
        if len(rows) == 1:
            assert (chunk.restored is not None) == (rows[0] > LONG_ROWS)
        if chunk.restored is not None:
            expanded["fresh"] += not any(chunk.prefix_lens)
            expanded["over a prefix"] += any(chunk.prefix_lens) and not any(chunk.own_start)
            expanded["over a hit"] += any(chunk.own_start)
            expanded["beside a decode row"] += 1 in rows
            assert (chunk.restored > 0) == any(chunk.prefix_lens)
    assert min(expanded.values()) > 0, expanded


@pytest.mark.parametrize("name", MIXED)
def test_decode_rows_beside_expanded_chunks_change_no_answer(results: Results, name: str) -> None:
    assert results[f"{name}/mixed"].output_ids == results[f"{name}/alone"].output_ids


def test_every_answer_is_finite(results: Results) -> None:
    assert all(is_finite(answer) for name, answer in results.answers.items() if not name.endswith("/mixed"))
    assert all(results.flushed)


def test_canonical_hits_equal_cold_runs_with_absorbed_weights(models: Models) -> None:
    options = {"kv_cache_dtype": PRESET, "chunked_prefill_size": 128}
    setup = EngineSetup(models.folder / LATENT, options, {"KVARN_CANONICAL": "1"})
    requests = [Request(kind, prompt(2 * 128 + LONG_ROWS + 20, seed=1), 8) for kind in ("cold", "hit")]
    results = run_plan(setup, [*map(alone, requests), flush()], models.scratch("canonical latents"))
    assert results["hit"].cached_tokens == 2 * 128
    same_bits(results["cold"], results["hit"])
    assert all(chunk.restored is None for chunk in results.chunks)
