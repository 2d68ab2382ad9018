"""With an exact tail longer than the context nothing is read from a record, and tokens equal those of transformers."""

from __future__ import annotations

import pytest
from engine_process import EngineSetup, Models, run_plan
from plan import Request, Results, Step, alone, flush
from tiny_models import MODELS, REFERENCE_LENGTHS, REFERENCE_TOKENS, prompt

TAIL_TOKENS = 1024


def _steps() -> list[Step]:
    """Each prompt by itself, then all at once, all from an empty cache: a hit would be read from records."""
    steps = []
    for n in REFERENCE_LENGTHS:
        steps += [alone(Request(f"{n}/alone", prompt(n, seed=n), REFERENCE_TOKENS)), flush()]
    together = [Request(f"{n}/together", prompt(n, seed=n), REFERENCE_TOKENS) for n in REFERENCE_LENGTHS]
    return [*steps, Step(together), flush()]


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.name)
def served(request: pytest.FixtureRequest, models: Models) -> tuple[Results, list[list[int]]]:
    """Return what the engine answered and what transformers did."""
    variables = {"KVARN_TAIL_TOKENS": str(TAIL_TOKENS)}
    setup = EngineSetup(models.path(request.param), {"chunked_prefill_size": 256}, variables)
    results = run_plan(setup, _steps(), models.scratch(f"exact-{request.param.name}"))
    return results, models.references[request.param.name]


@pytest.mark.parametrize("kind", ["alone", "together"])
def test_greedy_tokens_equal_those_of_transformers(served: tuple[Results, list[list[int]]], kind: str) -> None:
    results, references = served
    for n, reference in zip(REFERENCE_LENGTHS, references, strict=True):
        assert n + REFERENCE_TOKENS <= TAIL_TOKENS
        assert results[f"{n}/{kind}"].cached_tokens == 0
        assert results[f"{n}/{kind}"].output_ids == reference, f"prompt of {n} tokens"
