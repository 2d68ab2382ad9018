"""A model of which half the layers keep a recurrent state: the others hold tiles, inside SGLang's pool for such models.

Without SGLang's prefix cache, which keeps states on GPUs only. With an exact tail longer than the context no record is
read, so tokens equal those of transformers, in float32; few of them, because states carry rounding on.
"""

from __future__ import annotations

import pytest
from engine_process import EngineSetup, Models, run_plan
from plan import Request, Results, Step, alone
from tiny_models import HYBRID, REFERENCE_LENGTHS, prompt

TAIL_TOKENS = 1024
NEW_TOKENS = 8
# The states of so many requests; fewer than the requests that the tokens would allow.
STATES = 4


@pytest.fixture(scope="module")
def results(models: Models) -> Results:
    """Ask each prompt by itself, then all at once: more than have states."""
    options = {"disable_radix_cache": True, "max_mamba_cache_size": STATES, "skip_tokenizer_init": True}
    setup = EngineSetup(
        models.folder / HYBRID,
        options | {"chunked_prefill_size": 256},
        {"KVARN_TAIL_TOKENS": str(TAIL_TOKENS), "ENGINE_TEST_STATES": "1", "SGLANG_MAMBA_CONV_DTYPE": "float32"},
    )
    asked = {
        kind: [Request(f"{n}/{kind}", prompt(n, n), NEW_TOKENS) for n in REFERENCE_LENGTHS]
        for kind in ("alone", "together")
    }
    return run_plan(setup, [*map(alone, asked["alone"]), Step(asked["together"])], models.scratch("recurrent"))


def test_banner_tells_how_layers_are_kept_and_the_limit_of_states(results: Results) -> None:
    assert "layers: 2 in tiles, 2 with a recurrent state" in results.log
    assert f"at most {STATES} requests" in results.log


@pytest.mark.parametrize("kind", ["alone", "together"])
def test_greedy_tokens_equal_those_of_transformers(results: Results, models: Models, kind: str) -> None:
    assert len(REFERENCE_LENGTHS) > STATES
    for n, reference in zip(REFERENCE_LENGTHS, models.references[HYBRID], strict=True):
        assert n + NEW_TOKENS <= TAIL_TOKENS
        assert results[f"{n}/{kind}"].output_ids == reference[:NEW_TOKENS], f"prompt of {n} tokens"
