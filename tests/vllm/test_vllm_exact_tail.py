"""With an exact tail longer than the context nothing is read from a record: tokens equal those of transformers.

They also equal those of vLLM's own cache, whose log probabilities come close. Not to the last bit: rows are rotated
before they are stored, and rotated rows round differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from compare import logprob_difference
from engine_process import Models
from plan import Answer, Request
from serving import DTYPE, serving
from tiny_models import MODELS, REFERENCE_LENGTHS, REFERENCE_TOKENS, TinyModel, prompt

TAIL_TOKENS = 1024
CHUNK = 256
# Float32 everywhere. Measured: up to 1e-5.
ROUNDING = 1e-4


@dataclass(frozen=True, slots=True)
class Served:
    """Answers by cache dtype and name, and those of transformers in the order of `REFERENCE_LENGTHS`."""

    answers: dict[str, dict[str, Answer]]
    references: list[list[int]]


def _answers(models: Models, model: TinyModel, dtype: str) -> dict[str, Answer]:
    """Ask each prompt by itself, then all at once, all from an empty cache: a hit would be read from records."""
    options: dict[str, Any] = {"kv_cache_dtype": dtype, "max_num_batched_tokens": CHUNK}
    with serving(models.path(model), **options) as engine:
        alone = [Request(f"{n}/alone", prompt(n, seed=n), REFERENCE_TOKENS) for n in REFERENCE_LENGTHS]
        together = [Request(f"{n}/together", prompt(n, seed=n), REFERENCE_TOKENS) for n in REFERENCE_LENGTHS]
        return engine.ask_alone(*alone) | engine.ask(*together)


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.name)
def served(request: pytest.FixtureRequest, models: Models) -> Served:
    """Ask one model, with an exact tail and with vLLM's own cache."""
    model = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVARN_TAIL_TOKENS", str(TAIL_TOKENS))
        answers = {dtype: _answers(models, model, dtype) for dtype in (DTYPE, "auto")}
    return Served(answers, models.references[model.name])


@pytest.mark.parametrize("kind", ["alone", "together"])
@pytest.mark.parametrize("dtype", [DTYPE, "auto"])
def test_greedy_tokens_equal_those_of_transformers(served: Served, dtype: str, kind: str) -> None:
    for n, reference in zip(REFERENCE_LENGTHS, served.references, strict=True):
        assert n + REFERENCE_TOKENS <= TAIL_TOKENS
        answer = served.answers[dtype][f"{n}/{kind}"]
        assert answer.cached_tokens == 0
        assert answer.output_ids == reference, f"prompt of {n} tokens"


def test_log_probabilities_are_those_of_the_stock_cache_but_for_rounding(served: Served) -> None:
    for name, answer in served.answers[DTYPE].items():
        assert logprob_difference(answer, served.answers["auto"][name]) < ROUNDING, name
