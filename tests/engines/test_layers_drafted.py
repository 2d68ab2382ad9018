"""Drafts for models whose layers are not all K and V in tiles: windows, recurrent states, latents (MLA).

Drafts change no answer, to the last bit where every row is computed by itself. SGLang's attention to windows computes
none by itself on a CPU, so there it is but for rounding. Before each step everything past a request's accepted tokens,
in rings and records, is overwritten with NaN; windows, and states after each draft, are SGLang's to take back.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from compare import logprob_difference, same_bits
from drafting import (
    AGAIN,
    DRAFTS,
    FIRST,
    SECOND,
    TILE,
    TOGETHER,
    accepted,
    whole_sequences,
    with_drafts,
    without_drafts,
)
from engine_process import EngineSetup, Models, run_plan
from instruments import ANSWERS
from plan import Results
from tiny_models import HYBRID_WITH_MTP, LATENT, TALKATIVE

NAMES = [request.name for request in (*TOGETHER, SECOND, AGAIN)]
# Of log probabilities, in float32.
ROUNDING = 1e-4


@dataclass(frozen=True, slots=True)
class Case:
    """A model and what its engine needs.

    Args:
        model: its folder.
        drafter: what proposes drafts beside n-grams.
        exact: whether every row is computed by itself.
        options: arguments of the engine.
        variables: its environment.
    """

    model: str
    drafter: str
    exact: bool
    options: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)


CASES = {
    "latents": Case(LATENT, "standalone", exact=True),
    "states": Case(
        HYBRID_WITH_MTP,
        "nextn",
        exact=True,
        # On a CPU SGLang keeps no states for its prefix cache.
        options={"disable_radix_cache": True, "max_mamba_cache_size": 6, "skip_tokenizer_init": True},
        variables={"ENGINE_TEST_STATES": "1", "SGLANG_MAMBA_CONV_DTYPE": "float32"},
    ),
    "windows": Case(TALKATIVE, "standalone", exact=False),
}


@dataclass(frozen=True, slots=True)
class Found:
    """Answers without drafts and with them.

    Args:
        case: what was run.
        by_ngrams: whether drafts came from n-grams, not from a model; some of either are right.
        alone: every request by itself.
        drafted: together, and over what drafts left.
    """

    case: Case
    by_ngrams: bool
    alone: Results
    drafted: Results


@pytest.fixture(scope="module", params=[(name, kind) for name in CASES for kind in ("ngrams", "model")], ids="-".join)
def found(request: pytest.FixtureRequest, models: Models) -> Found:
    """Run the requests without drafts, then with them."""
    name, kind = request.param
    case, by_ngrams = CASES[name], kind == "ngrams"
    folder = models.folder / case.model
    # SGLang finds the slots of drafts with a Triton kernel, on any device.
    variables = {"KVARN_CANONICAL": "1", "ENGINE_TEST_ROWWISE": "1", "TRITON_INTERPRET": "1", **case.variables}
    alone = run_plan(EngineSetup(folder, case.options, variables), without_drafts(), models.scratch(f"{name}-alone"))
    variables[ANSWERS] = json.dumps(whole_sequences(alone))
    drafter = "ngram" if by_ngrams else case.drafter
    options = case.options | {"speculative_algorithm": drafter, "speculative_num_draft_tokens": DRAFTS + 1}
    if by_ngrams:
        options["speculative_ngram_max_bfs_breadth"] = 1
    elif drafter == "standalone":
        options["speculative_draft_model_path"] = str(folder)
    drafted = run_plan(EngineSetup(folder, options, variables), with_drafts(), models.scratch(f"{name}-{drafter}"))
    return Found(case, by_ngrams, alone, drafted)


@pytest.mark.parametrize("name", NAMES)
def test_drafts_change_no_answer(found: Found, name: str) -> None:
    one, other = found.drafted[name], found.alone[name]
    if found.case.exact:
        same_bits(one, other)
    else:
        assert one.output_ids == other.output_ids
        assert logprob_difference(one, other) < ROUNDING


def test_tiles_that_drafts_filled_are_hit(found: Found) -> None:
    hits = [found.drafted[request.name].cached_tokens for request in (SECOND, AGAIN)]
    assert hits == ([0, 0] if "disable_radix_cache" in found.case.options else [TILE, 2 * TILE])
    assert len(FIRST.tokens) < 2 * TILE


def test_drafts_were_accepted_and_rejected(found: Found) -> None:
    """What the comparisons rest on. A draft model that is the model itself errs only where that reads records."""
    counts = set(accepted(found.drafted))
    if found.by_ngrams or found.case.drafter != "standalone":
        assert counts == set(range(1, DRAFTS + 2))
    assert {DRAFTS + 1} < counts


def test_draft_model_keeps_its_own_cache(found: Found) -> None:
    pools = [run.log.count("KV Cache is allocated. dtype: torch.float32") for run in (found.alone, found.drafted)]
    assert pools[1] - pools[0] == (0 if found.by_ngrams else 1)


def test_every_flush_succeeded(found: Found) -> None:
    assert all(found.drafted.flushed)
