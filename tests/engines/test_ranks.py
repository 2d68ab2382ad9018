"""SGLang at tensor parallel 2: every rank has a scheduler of its own, and all decide the same."""

from __future__ import annotations

import pytest
from engine_process import Models, environment
from tiny_models import QWEN3_GROUP_2
from trails import REQUESTS, check, trails_of

from benchmarks.serving.engines import ENGINES, started_with


def test_ranks_decide_the_same_under_traffic(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(models.path(QWEN3_GROUP_2))
    folder = models.scratch("ranks-sglang")
    folder.mkdir()
    options = {"device": "cpu", "context_length": 1024, "max_total_tokens": 2048, "chunked_prefill_size": 256}
    arguments = started_with("sglang", model, "float32", "kvarn_k4v2_g128", REQUESTS, options)
    arguments |= ENGINES["sglang"].parallel(2)
    check(trails_of("sglang", arguments, folder, monkeypatch, **environment()))
