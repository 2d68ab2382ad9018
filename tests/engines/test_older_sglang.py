"""The oldest SGLang that is supported, laid over the installed one: cold run and hit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from compare import same_bits
from engine_process import EngineSetup, Models, run_plan
from plan import Request, alone, flush
from tiny_models import LLAMA_GROUP_3, prompt

VARIABLE = "KVARN_SGLANG_0517"
TILE = 128


def overlay() -> Path:
    """Return the folder with the older SGLang, or skip where there is none."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} names no folder with SGLang 0.5.17, its transformers and a numpy below 2.3")
    if not Path(folder, "sglang").is_dir():
        pytest.skip(f"{VARIABLE}={folder} holds no SGLang")
    return Path(folder)


def test_hit_equals_cold_run_in_0_5_17(models: Models) -> None:
    setup = EngineSetup(
        models.path(LLAMA_GROUP_3),
        {"max_total_tokens": 1024},
        # Its paged allocator is a Triton kernel, on any device.
        {"KVARN_CANONICAL": "1", "TRITON_INTERPRET": "1"},
        overlay=overlay(),
    )
    steps = [alone(Request("cold", prompt(300), 8)), alone(Request("hit", prompt(300), 8)), flush()]
    results = run_plan(setup, steps, models.scratch("older"))
    assert "in SGLang 0.5.17: kvarn_k4v2_g128" in results.log
    assert results["cold"].cached_tokens == 0
    assert results["hit"].cached_tokens == 2 * TILE
    same_bits(results["cold"], results["hit"])
    assert all(results.flushed)
