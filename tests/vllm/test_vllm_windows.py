"""A model of which half the layers have a sliding window: those keep vLLM's cache, the others are cached in tiles.

With no flag beside the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from compare import divergence, is_finite, logprob_difference
from engine_process import Models
from plan import Answer, Request
from serving import Serving, serving
from tiny_models import LAYERS, VOCABULARY, WINDOW, WINDOWED, prompt

PRESET = "kvarn_k8v4_g128"
# Shorter than the window, as long, and with windows that begin in a tile that is a record.
LENGTHS = (5, WINDOW, 130, 300, 700)
EXACT_TAIL = 1024
# Of the first token, nats. Measured: up to 4e-14 for exact rows, 4e-5 for records.
MOST_EXACT, MOST = 1e-7, 1e-3
# Requests of other tokens, together longer than the cache.
OTHERS = [Request(f"other/{i}", prompt(900, seed=70 + i), 4) for i in range(4)]
OPTIONS = {"enable_prefix_caching": True}
FEW_BYTES = 8 << 20


@dataclass(slots=True)
class Found:
    """Answers by name, and what the engine with records was like."""

    answers: dict[str, Answer] = field(default_factory=dict)
    layers: list[type] = field(default_factory=list)
    groups: list[tuple[str, int, int]] = field(default_factory=list)
    block_bytes: int = 0
    wanted_block_bytes: int = 0


def _requests(kind: str) -> list[Request]:
    return [Request(f"{n}/{kind}", prompt(n, seed=n), 16, distribution=True) for n in LENGTHS]


def _turns(engine: Serving, kind: str) -> dict[str, Answer]:
    """Three turns of a conversation: each goes on from all that the one before left in the cache."""
    history, answers = [], {}
    for turn, (appended, new_tokens) in enumerate(((560, 30), (60, 70), (90, 12)), start=1):
        history = history + prompt(appended, seed=900 + turn)
        answers |= engine.ask(Request(f"turn {turn}/{kind}", history, new_tokens, distribution=True))
        # The same history in all engines, whatever they answer.
        history = history + prompt(new_tokens, seed=950 + turn)
    return answers


@pytest.fixture(scope="module")
def found(models: Models) -> Found:
    """Ask the stock cache; exact tails; then records: cold, hit, in turns, and after they were evicted."""
    found, folder = Found(), models.folder / WINDOWED
    with serving(folder, kv_cache_dtype="auto", **OPTIONS) as engine:
        found.answers |= engine.ask(*_requests("stock")) | _turns(engine, "stock")
    with pytest.MonkeyPatch.context() as exact:
        exact.setenv("KVARN_TAIL_TOKENS", str(EXACT_TAIL))
        with serving(folder, kv_cache_dtype=PRESET, **OPTIONS) as engine:
            found.answers |= engine.ask(*_requests("exact"))
    with serving(folder, kv_cache_dtype=PRESET, kv_cache_memory_bytes=FEW_BYTES, **OPTIONS) as engine:
        _note(engine, found)
        for kind in ("cold", "hit"):
            found.answers |= engine.ask(*_requests(kind))
        found.answers |= _turns(engine, "hit") | engine.ask(*OTHERS)
        for kind in ("evicted", "hit again"):
            found.answers |= engine.ask(*_requests(kind))
    with serving(folder, kv_cache_dtype=PRESET, speculative_config=_NGRAM, **OPTIONS) as engine:
        found.answers |= engine.ask(*_requests("drafts"))
    return found


_NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2}


def _note(engine: Serving, found: Found) -> None:
    config = engine.scheduler.kv_cache_config
    context = engine.config.compilation_config.static_forward_context
    found.layers = [type(layer.impl) for layer in context.values() if hasattr(layer, "impl")]
    found.groups = [
        (type(group.kv_cache_spec).__name__, len(group.layer_names), group.kv_cache_spec.block_size)
        for group in config.kv_cache_groups
    ]
    assert engine.tail is not None
    found.block_bytes = config.kv_cache_tensors[0].block_stride
    shape = engine.tail.shape
    found.wanted_block_bytes = shape.block_bytes(engine.tail.pool.config.tiles_per_block)


def test_layers_with_a_window_have_vllms_attention_and_the_others_ours(found: Found) -> None:
    from kvarn.vllm_backend.backend import TileAttention

    assert [issubclass(impl, TileAttention) for impl in found.layers] == [False, True] * LAYERS


def test_no_block_is_larger_than_records_and_rings_need(found: Found) -> None:
    assert [name for name, _, _ in found.groups].count("SlidingWindowSpec") >= 1
    assert found.block_bytes == found.wanted_block_bytes


def test_every_answer_is_finite(found: Found) -> None:
    assert [n for n, a in found.answers.items() if not is_finite(a)] == []
    assert all(len(a.distribution) in (0, VOCABULARY) for a in found.answers.values())


def test_exact_rows_give_what_the_stock_cache_gives(found: Found) -> None:
    answers = found.answers
    assert max(divergence(answers[f"{n}/exact"], answers[f"{n}/stock"]) for n in LENGTHS) < MOST_EXACT
    assert max(logprob_difference(answers[f"{n}/exact"], answers[f"{n}/stock"]) for n in LENGTHS) < 1e-4


@pytest.mark.parametrize("kind", ["cold", "hit", "evicted", "hit again", "drafts"])
def test_records_give_nearly_that(found: Found, kind: str) -> None:
    answers = found.answers
    assert max(divergence(answers[f"{n}/{kind}"], answers[f"{n}/stock"]) for n in LENGTHS) < MOST


def test_later_turns_give_nearly_that_too(found: Found) -> None:
    answers = found.answers
    assert answers["turn 2/hit"].cached_tokens > 0
    assert max(divergence(answers[f"turn {t}/hit"], answers[f"turn {t}/stock"]) for t in (1, 2, 3)) < MOST


def test_prompts_were_hit_evicted_and_hit_again(found: Found) -> None:
    hits = {kind: found.answers[f"{LENGTHS[-1]}/{kind}"].cached_tokens for kind in ("hit", "evicted", "hit again")}
    assert hits["evicted"] == 0 < hits["hit"] == hits["hit again"]
