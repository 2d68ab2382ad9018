"""``python -m sglang.launch_server`` with something that KVarN can't serve: our sentence, an exit code, no server."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Models
from engine_process import launch_server
from tiny_models import QWEN3_GROUP_2

DTYPE = "--kv-cache-dtype=kvarn_k4v2_g128"
REFUSALS = {
    "unknown preset": (["--kv-cache-dtype=kvarn_k4v2_g12"], ["Unknown KV cache dtype 'kvarn_k4v2_g12'", "Did you mean"]),
    "page size": ([DTYPE, "--page-size=64"], ["--page-size 64 does not fit kvarn_k4v2_g128", "leave the flag out"]),
    "host cache": ([DTYPE, "--enable-hierarchical-cache"], ["--enable-hierarchical-cache can't be used"]),
    "drafts": ([DTYPE, "--speculative-algorithm=NGRAM"], ["--speculative-algorithm NGRAM can't be used"]),
    "attention backend": (
        [DTYPE, "--attention-backend=torch_native"],
        ["--attention-backend torch_native can't read the records of kvarn_k4v2_g128"],
    ),
}


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.replace(" ", "-"))
def test_server_does_not_start(models: Models, tmp_path: Path, case: str) -> None:
    arguments, sentences = REFUSALS[case]
    shared = [f"--model-path={models.path(QWEN3_GROUP_2)}", "--device=cpu", "--dtype=float32", "--port=0"]
    code, said = launch_server([*shared, *arguments], tmp_path)
    assert code > 0, "it went on until it was killed, or ended as if all were well"
    for sentence in sentences:
        assert sentence in said
    assert "Load weight begin" not in said
    assert "Uvicorn running" not in said
