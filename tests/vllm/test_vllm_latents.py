"""Multi-head latent attention: latents in tiles, against vLLM's own cache of them, cold, hit and with drafts.

On a CPU without AMX vLLM gives this attention blocks of 16 tokens and no prefix cache, because its own kernel there
knows no others. The engines with tiles believe that there is AMX. Its rotary kernel turns the wrong numbers where rows
are no neighbours in memory, as here: torch does that instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from compare import divergence, is_finite
from engine_process import Models
from plan import Answer, Request
from serving import Serving, serving
from tiny_models import LATENT, LATENT_DIM, LAYERS, ROPE_DIM, prompt

from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.rows import LatentRows
from kvarn.core.prefill_plan import LONG_ROWS, PrefillPlan
from kvarn.core.step import Step
from kvarn.presets import get_preset

PRESET = "kvarn_k8v4_g128"
LENGTHS = (5, 128, 200, 300)
NEW_TOKENS = 20
EXACT_TAIL = 1024
SHARED = 256
# Of the first token, nats. Measured: rounding from exact rows, up to 1e-4 from records of 8 bits.
MOST_EXACT, MOST = 1e-6, 2e-3
TORCH_ROTARY = {"custom_ops": ["none", "-rotary_embedding"]}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


def _requests(kind: str) -> list[Request]:
    return [Request(f"{n}/{kind}", prompt(n, seed=n), NEW_TOKENS, distribution=True) for n in LENGTHS]


def _sharing(kind: str) -> list[Request]:
    """Return two prompts, of which the second begins as the first and goes on for more than a short chunk."""
    first, other = prompt(SHARED + 40, seed=7), prompt(LONG_ROWS + 30, seed=8)
    return [
        Request(f"first/{kind}", first, 1, distribution=True),
        Request(f"second/{kind}", first[:SHARED] + other, 1, distribution=True),
    ]


@contextmanager
def _counted(calls: Counter[str]) -> Iterator[None]:
    """Count calls by what attends, and restored keys."""
    from kvarn.vllm_backend import latent_backend

    absorbed, expanded = latent_backend.latent_attention, latent_backend.expanded_attention

    def attend(*args: object) -> torch.Tensor:
        calls["absorbed"] += 1
        return absorbed(*args)

    def expand(
        q: torch.Tensor, rows: LatentRows, layer: object, step: Step, plan: PrefillPlan, *args: object
    ) -> torch.Tensor:
        calls.update(expanded=1, restored=plan.most_restored)
        return expanded(q, rows, layer, step, plan, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_backend, "latent_attention", attend)
        patch.setattr(latent_backend, "expanded_attention", expand)
        yield


@contextmanager
def _tiles(models: Models, **options: object) -> Iterator[Serving]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        with serving(
            models.folder / LATENT,
            kv_cache_dtype=PRESET,
            enable_prefix_caching=True,
            compilation_config=TORCH_ROTARY,
            **options,
        ) as engine:
            yield engine


@pytest.fixture(scope="module")
def answers(models: Models) -> Iterator[dict[str, Answer]]:
    """Ask the stock cache; exact tails; records, cold and hit; and with drafts."""
    found: dict[str, Answer] = {}
    with serving(models.folder / LATENT, kv_cache_dtype="auto", compilation_config=TORCH_ROTARY) as engine:
        found |= engine.ask(*_requests("stock"), *_sharing("stock"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVARN_TAIL_TOKENS", str(EXACT_TAIL))
        calls: Counter[str] = Counter()
        with _tiles(models, max_num_batched_tokens=96) as engine, _counted(calls):
            found |= engine.ask(*_requests("exact"))
        assert min(calls["absorbed"], calls["expanded"], calls["restored"]) > 0
    with _tiles(models) as engine:
        pool = engine.tail.pool
        assert len(pool.layers) == LAYERS
        assert pool.config.layout == LatentLayout.of(get_preset(PRESET), LATENT_DIM, ROPE_DIM)
        for kind in ("cold", "hit"):
            found |= engine.ask(*_requests(kind))
        found |= engine.ask(*_sharing("same step"))
        (step,) = (step for step in engine.steps if "first/same step" in step.query_lens)
        assert step.prefix_lens == {"first/same step": 0, "second/same step": SHARED}
    with _tiles(models, speculative_config=NGRAM) as engine:
        found |= engine.ask(*_requests("drafts"))
    yield found


def test_every_answer_is_finite(answers: dict[str, Answer]) -> None:
    assert all(is_finite(answer) for answer in answers.values())


def test_exact_rows_give_what_the_stock_cache_gives(answers: dict[str, Answer]) -> None:
    assert max(divergence(answers[f"{n}/exact"], answers[f"{n}/stock"]) for n in LENGTHS) < MOST_EXACT
    assert all(answers[f"{n}/exact"].output_ids == answers[f"{n}/stock"].output_ids for n in LENGTHS)


def test_records_give_nearly_that(answers: dict[str, Answer]) -> None:
    assert answers[f"{LENGTHS[-1]}/hit"].cached_tokens > 0
    found = [divergence(answers[f"{n}/{kind}"], answers[f"{n}/stock"]) for n in LENGTHS for kind in ("cold", "hit")]
    assert max(found) < MOST


def test_prompt_may_hit_what_another_one_fills_in_the_same_step(answers: dict[str, Answer]) -> None:
    assert (
        max(divergence(answers[f"{name}/same step"], answers[f"{name}/stock"]) for name in ("first", "second")) < MOST
    )


def test_drafts_change_no_answer(answers: dict[str, Answer]) -> None:
    assert all(answers[f"{n}/drafts"].output_ids == answers[f"{n}/cold"].output_ids for n in LENGTHS)
