"""``python -m sglang.launch_server`` with something that KVarN can't serve: our sentence, an exit code, no server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from engine_process import Models, launch_server
from tiny_models import QWEN3_GROUP_2

DTYPE = "--kv-cache-dtype=kvarn_k4v2_g128"
REFUSALS = {
    "unknown preset": (
        ["--kv-cache-dtype=kvarn_k4v2_g12"],
        ["Unknown KV cache dtype 'kvarn_k4v2_g12'", "Did you mean"],
    ),
    "page size": ([DTYPE, "--page-size=64"], ["--page-size 64 does not fit kvarn_k4v2_g128", "leave the flag out"]),
    "host cache": ([DTYPE, "--enable-hierarchical-cache"], ["--enable-hierarchical-cache can't be used"]),
    "drafts": (
        [DTYPE, "--speculative-algorithm=NGRAM"],
        ["makes a tree of drafts", "pass --speculative-ngram-max-bfs-breadth 1"],
    ),
    "attention backend": (
        [DTYPE, "--attention-backend=torch_native"],
        ["--attention-backend torch_native can't read the records of kvarn_k4v2_g128"],
    ),
}


@pytest.fixture(scope="module")
def ended(models: Models) -> dict[str, tuple[int, str]]:
    """Return exit code and output of every case. Most of the time goes into importing SGLang, so two run at once."""
    shared = [f"--model-path={models.path(QWEN3_GROUP_2)}", "--device=cpu", "--dtype=float32"]

    def launch(case: str) -> tuple[int, str]:
        arguments, _ = REFUSALS[case]
        return launch_server([*shared, *arguments], models.scratch(f"refusal-{case}"))

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(REFUSALS, pool.map(launch, REFUSALS), strict=True))


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.replace(" ", "-"))
def test_server_does_not_start(ended: dict[str, tuple[int, str]], case: str) -> None:
    code, said = ended[case]
    assert code > 0, "it went on until it was killed, or ended as if all were well"
    for sentence in REFUSALS[case][1]:
        assert sentence in said
    assert "Load weight begin" not in said
    assert "Uvicorn running" not in said
