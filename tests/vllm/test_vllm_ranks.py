"""vLLM at tensor parallel 2: one scheduler, and every rank derives the same from what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_process import Models
from tiny_models import QWEN3_GROUP_2
from trails import REQUESTS, check, trails_of

from benchmarks.serving.engines import ENGINES, started_with

_ROOT = Path(__file__).resolve().parents[2]


def test_ranks_decide_the_same_under_traffic(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(models.path(QWEN3_GROUP_2))
    folder = models.scratch("ranks-vllm")
    folder.mkdir()
    options = {"max_model_len": 1024, "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
    options["max_num_batched_tokens"] = 256
    arguments = started_with("vllm", model, "float32", "kvarn_k4v2_g128", REQUESTS, options)
    arguments |= ENGINES["vllm"].parallel(2)
    # spawned, as with GPUs, so that the processes must find their own way to the watch
    variables = {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    check(trails_of("vllm", arguments, folder, monkeypatch, **variables))
