"""Speculative decoding, every row computed by itself: drafts change no answer, to the last bit.

Drafts come from vLLM's n-gram proposer as it is, from one that knows the answers and is wrong at random, from a draft
model, and from an EAGLE head. Before each step everything past a request's accepted tokens, in rings and records, is
overwritten with NaN.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import same_bits
from draft_heads import save_eagle3_head, save_mimo
from engine_process import Models
from plan import Answer, Request
from row_by_row import compute_row_by_row
from serving import Scheduled, Serving, serving
from tiny_models import LAYERS, LLAMA_GROUP_3, QWEN3_GROUP_2, prompt

from kvarn.errors import UnsupportedConfig
from kvarn.vllm_backend import compat

TILE, PRESET = 64, "kvarn_k4v2_g64"
DRAFTS = 4
NGRAM = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
# All go over the end of a tile; what the last one hits was drafted by the first, which goes on with drafts.
REQUESTS = [
    Request("repeats", [7, 8, 9, 10, 11, 12, 13] * 17, 20),
    Request("short", prompt(58, 1), 16),
    Request("even", prompt(59, 2), 16),
]
SECOND = "second"
AFTER = 12


@dataclass(slots=True)
class Part:
    """What requests that ran together were answered, and what was done for that."""

    answers: dict[str, Answer] = field(default_factory=dict)
    steps: list[Scheduled] = field(default_factory=list)
    kinds: Counter[tuple[str, int]] = field(default_factory=Counter)
    draft_layers: list[tuple[str, torch.dtype]] = field(default_factory=list)


@contextmanager
def watched(part: Part) -> Iterator[None]:
    """Count steps by kind and most rows of a request, and poison what no step may read."""
    from kvarn.vllm_backend import backend

    describe = backend.describe

    def watch(pool: Any, metadata: Any, tail_blocks: torch.Tensor, group: int) -> Any:
        counts = metadata.query_start.diff()
        part.kinds["uniform" if metadata.rows_each else "chunk", int(counts.max())] += 1
        ring = pool.config.ring_tokens
        for length, count, table, tails in zip(
            metadata.seq_lens.tolist(), counts.tolist(), metadata.block_table, tail_blocks, strict=True
        ):
            done = length - count
            provisional = table[done // TILE : -(-length // TILE)].long()
            wrong = torch.arange(done, done + pool.config.draft_tokens) % ring
            for i, layer in enumerate(pool.layers):
                layer.records[provisional] = 0xFF
                layer.tails[tails[i // pool.rings_per_block].long(), :, :, wrong] = torch.nan
        return describe(pool, metadata, tail_blocks, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "describe", watch)
        yield


@contextmanager
def knowing_drafter(answers: dict[str, Answer]) -> Iterator[None]:
    """Let the n-gram proposer know how sequences go on; after some right drafts come wrong ones, or none."""
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    pick = random.Random(0)
    known = [answer.prompt + answer.output_ids for answer in answers.values()]

    def propose(self: Any, k: int, sampled: list[list[int]], lengths: Any, tokens: Any, **_: Any) -> list[list[int]]:
        equal, drafts = pick.random() < 0.7, []
        for i, new in enumerate(sampled):
            seen = tokens[i, : lengths[i]].tolist()
            after = next((s[len(seen) :] for s in known if new and s[: len(seen)] == seen), [])
            right = pick.randrange(k + 1)
            chain = after[:right] + [3] * (k - len(after[:right]))
            drafts.append(chain[: k if equal else pick.randrange(k + 1)] if after else [])
        return drafts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NgramProposer, "propose", propose)
        yield


def run(engine: Serving, requests: list[Request]) -> Part:
    """Run requests from an empty cache."""
    part = Part()
    assert engine.flush()
    before = len(engine.steps)
    with watched(part):
        part.answers = engine.ask(*requests)
    part.steps = engine.steps[before:]
    return part


def second_request(answers: dict[str, Answer]) -> Request:
    """A request that begins with the first's prompt and answer up to a tile's end."""
    first = answers["repeats"]
    return Request(SECOND, (first.prompt + first.output_ids)[: 2 * TILE + 2], 8, starts_after=("repeats", AFTER))


def save_eagle_head(model: Path, folder: Path) -> None:
    """Make an EAGLE head of a model's first layer, which takes the hidden state and lets the token alone."""
    from safetensors.torch import load_file, save_file

    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    layer = {name: x for name, x in load_file(model / "model.safetensors").items() if ".layers.0." in name}
    head = {name.removeprefix("model."): x for name, x in layer.items() if "input_layernorm" not in name}
    width = config["hidden_size"]
    head["fc.weight"] = torch.cat([torch.zeros(width, width), torch.eye(width)], dim=1)
    save_file(head, folder / "model.safetensors")


@contextmanager
def row_by_row() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        compute_row_by_row(patch)
        # the n-gram proposer takes longer to compile than all of these requests
        patch.setenv("NUMBA_DISABLE_JIT", "1")
        yield patch


@pytest.fixture(scope="module")
def parts(models: Models) -> Iterator[dict[str, Part]]:
    """In canonical mode, run everything without drafts, one by one, and then with each drafter, together."""
    folder = models.path(QWEN3_GROUP_2)
    with row_by_row() as patch:
        patch.setenv("KVARN_CANONICAL", "1")
        with serving(folder, kv_cache_dtype=PRESET) as engine:
            answers = engine.ask_alone(*REQUESTS)
            second = second_request(answers)
            answers |= engine.ask_alone(Request(SECOND, second.tokens, second.new_tokens))
        parts = {"alone": Part(answers)}
        with serving(folder, kv_cache_dtype=PRESET, speculative_config=NGRAM) as engine:
            parts["ngram"] = run(engine, REQUESTS[:1])
            with knowing_drafter(answers):
                parts["knowing"] = run(engine, [*REQUESTS, second])
        drafter = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": DRAFTS}
        with serving(folder, kv_cache_dtype=PRESET, speculative_config=drafter) as engine:
            parts["draft model"] = run(engine, [*REQUESTS, second])
            layers = engine.config.compilation_config.static_forward_context
            parts["draft model"].draft_layers = [
                (layer.get_attn_backend().get_name(), layer.kv_cache.dtype)
                for name, layer in layers.items()
                if name.startswith("draft_model")
            ]
        yield parts


@pytest.mark.parametrize("drafter", ["ngram", "knowing", "draft model"])
def test_drafts_change_no_answer(parts: dict[str, Part], drafter: str) -> None:
    for name, answer in parts[drafter].answers.items():
        same_bits(answer, parts["alone"].answers[name])


def test_drafts_change_no_answer_with_an_exact_tail(models: Models) -> None:
    """A tail of at least the drafts' length: rows are read exact, or from records, as without drafts."""
    folder = models.path(QWEN3_GROUP_2)
    with row_by_row():
        with serving(folder, kv_cache_dtype=PRESET) as engine:
            answers = engine.ask_alone(*REQUESTS)
        with serving(folder, kv_cache_dtype=PRESET, speculative_config=NGRAM) as engine, knowing_drafter(answers):
            part = run(engine, REQUESTS)
    for name, answer in part.answers.items():
        same_bits(answer, answers[name])


def test_heads_change_no_answer(models: Models, tmp_path: Path) -> None:
    """An EAGLE and an EAGLE-3 head, whose drafts are mostly wrong. vLLM lets a hit end one block earlier with them."""
    folder, eagle, eagle3 = models.path(LLAMA_GROUP_3), tmp_path / "eagle", tmp_path / "eagle3"
    eagle.mkdir()
    save_eagle_head(folder, eagle)
    save_eagle3_head(folder, eagle3, (0, 1))
    heads = [{"method": path.name, "model": str(path), "num_speculative_tokens": DRAFTS} for path in (eagle, eagle3)]
    compare_heads(folder, heads)


def test_multi_token_prediction_changes_no_answer(models: Models, tmp_path: Path) -> None:
    """A MiMo, whose head comes with the model."""
    save_mimo(models.path(LLAMA_GROUP_3), tmp_path / "mimo")
    compare_heads(tmp_path / "mimo", [{"method": "mtp", "num_speculative_tokens": DRAFTS}])


def compare_heads(folder: Path, heads: list[dict[str, Any]]) -> None:
    """Assert that a model answers with each head what it answers with none, and verifies drafts."""
    requests, parts = REQUESTS[1:], []
    with row_by_row() as patch:
        patch.setenv("KVARN_CANONICAL", "1")
        for options in ({}, *({"speculative_config": head} for head in heads)):
            with serving(folder, kv_cache_dtype=PRESET, **options) as engine:
                parts.append(run(engine, requests))
    for part in parts[1:]:
        assert part.kinds["uniform", DRAFTS + 1] > 3
        for request in requests:
            same_bits(part.answers[request.name], parts[0].answers[request.name])


def test_draft_layers_that_would_be_cached_in_tiles_are_refused(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a vLLM not look at the dtype that is set for its draft model."""
    save_eagle_head(models.path(LLAMA_GROUP_3), tmp_path)
    drafter = {"method": "eagle", "model": str(tmp_path), "num_speculative_tokens": DRAFTS}
    monkeypatch.setattr(compat, "keep_drafts_raw", lambda _: None)
    engine = serving(models.path(LLAMA_GROUP_3), kv_cache_dtype=PRESET, speculative_config=drafter)
    with pytest.raises(UnsupportedConfig, match="A draft model's layers can't be cached in tiles"), engine:
        pass


def test_second_request_hits_tiles_that_the_first_drafted_and_goes_on_drafting(parts: dict[str, Part]) -> None:
    for drafter in ("knowing", "draft model"):
        part = parts[drafter]
        assert part.answers[SECOND].cached_tokens == 2 * TILE
        assert any(step.query_lens.get("repeats", 0) > 1 and SECOND in step.query_lens for step in part.steps)


def test_drafts_were_verified_in_uniform_steps_and_beside_chunks(parts: dict[str, Part]) -> None:
    """What the comparisons rest on."""
    assert parts["draft model"].kinds["uniform", DRAFTS + 1] > 3
    kinds = parts["knowing"].kinds
    assert kinds["uniform", DRAFTS + 1] > 0
    assert sum(count for (kind, rows), count in kinds.items() if kind == "chunk" and rows <= DRAFTS + 1) > 0
    assert {accepted for part in parts.values() for accepted in _accepted(part.steps)} >= {1, 2, 3, 4, 5}


def test_tiles_were_filled_by_drafts_that_were_rejected(parts: dict[str, Part]) -> None:
    ends = [
        (prefix + rows) // TILE > after // TILE
        for part in parts.values()
        for prefix, rows, after in _moves(part.steps)
        if rows > 1
    ]
    assert any(ends)


def test_draft_model_keeps_its_own_cache_and_attention(parts: dict[str, Part]) -> None:
    assert parts["draft model"].draft_layers == [("CPU_ATTN", torch.float32)] * LAYERS


def _moves(steps: list[Scheduled]) -> Iterator[tuple[int, int, int]]:
    """Yield of every step of a request: tokens before it, its rows, and tokens before the request's next."""
    for step, following in zip(steps, steps[1:], strict=False):
        for name, rows in step.query_lens.items():
            if name in following.prefix_lens:
                yield step.prefix_lens[name], rows, following.prefix_lens[name]


def _accepted(steps: list[Scheduled]) -> Iterator[int]:
    yield from (after - prefix for prefix, rows, after in _moves(steps) if 1 < rows <= DRAFTS + 1)
