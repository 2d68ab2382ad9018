"""Speculative decoding, every row computed by itself: drafts change no answer, to the last bit.

Drafts come from a corpus of n-grams, in trees as SGLang's corpus makes them, from a draft model, and from an EAGLE and
an EAGLE-3 head. All know the answers and are wrong at random, but for the draft model, which is the model itself.
Before each step everything past a request's accepted tokens, in rings and records, is overwritten with NaN. SGLang
overlaps no drafts on a CPU.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from compare import same_bits
from drafting import AGAIN, DRAFTS, FIRST, SECOND, TILE, TOGETHER, moves, verified, whole_sequences, with_drafts
from engine_process import EngineSetup, Models, run_plan
from instruments import ANSWERS
from plan import Results
from test_canonical_schedules import run_schedules
from tiny_models import EAGLE3_HEAD, EAGLE_HEAD, QWEN3_GROUP_2

NAMES = [request.name for request in (*TOGETHER, SECOND, AGAIN)]


@pytest.fixture(scope="module")
def alone(models: Models) -> Results:
    """Return the answers without drafts, which come from an engine that has more to do."""
    return run_schedules(models)


@pytest.fixture(scope="module", params=["ngram", "standalone", "eagle", "eagle3"])
def drafter(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def drafted(drafter: str, models: Models, alone: Results) -> Results:
    """Run everything together on one engine with drafts."""
    path = models.path(QWEN3_GROUP_2)
    options: dict[str, Any] = {"speculative_algorithm": drafter, "speculative_num_draft_tokens": DRAFTS + 1}
    # SGLang finds the slots of drafts with a Triton kernel, on any device.
    variables = {"KVARN_CANONICAL": "1", "ENGINE_TEST_ROWWISE": "1", "TRITON_INTERPRET": "1"}
    variables[ANSWERS] = json.dumps(whole_sequences(alone))
    if drafter == "ngram":
        options["speculative_ngram_max_bfs_breadth"] = 1
    else:
        folders = {"standalone": path, "eagle": models.folder / EAGLE_HEAD, "eagle3": models.folder / EAGLE3_HEAD}
        options["speculative_draft_model_path"] = str(folders[drafter])
    return run_plan(EngineSetup(path, options, variables), with_drafts(), models.scratch(f"drafts-{drafter}"))


@pytest.mark.parametrize("name", NAMES)
def test_drafts_change_no_answer(drafted: Results, alone: Results, name: str) -> None:
    same_bits(drafted[name], alone[name])


def test_request_hits_tiles_of_one_that_goes_on_drafting(drafted: Results) -> None:
    assert drafted[SECOND.name].cached_tokens == TILE
    verified = [set(chunk.rids) for chunk in drafted.chunks if chunk.drafts]
    assert any({SECOND.name, FIRST.name} <= names for names in verified)


def test_request_hits_tiles_that_drafts_filled(drafted: Results) -> None:
    assert drafted[AGAIN.name].cached_tokens == 2 * TILE > len(FIRST.tokens)


def test_drafts_were_accepted_and_rejected_and_filled_tiles(drafter: str, drafted: Results) -> None:
    """What the comparisons rest on."""
    accepted = {after - before for before, after in moves(drafted)}
    filled = [
        after // TILE > before // TILE
        for before, after in moves(drafted)
        if (before + DRAFTS + 1) // TILE > before // TILE
    ]
    assert True in filled
    assert DRAFTS + 1 in accepted
    if drafter != "standalone":
        assert accepted == set(range(1, DRAFTS + 2))
        assert False in filled


def test_requests_ended_inside_a_chain(drafted: Results) -> None:
    ends = {request.name: len(request.tokens) + request.new_tokens for request in TOGETHER}
    last = dict(verified(drafted))
    assert any(last[name] + DRAFTS + 1 > end for name, end in ends.items())


def test_draft_model_keeps_its_own_cache_and_attention(drafter: str, drafted: Results) -> None:
    said = "Overriding draft attention backend to intel_amx", "KV Cache is allocated. dtype: torch.float32"
    assert [line in drafted.log for line in said] == [drafter != "ngram"] * 2


def test_every_flush_succeeded(drafted: Results) -> None:
    assert all(drafted.flushed)
