"""Two ranks of an engine under traffic, and what they decided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.serving import trail
from benchmarks.serving.jobs import run_job

RANKS, STEPS, REQUESTS = 2, 16, 4
LONGEST, ANSWERS, VOCABULARY = 300, 8, 512


def trails_of(
    engine: str, arguments: dict[str, Any], folder: Path, patch: pytest.MonkeyPatch, **variables: str
) -> list[trail.Report]:
    """Keep an engine busy, and return the trail of each rank.

    Args:
        engine: one of the benchmarks' engines.
        arguments: of the engine's own.
        folder: for files.
        patch: sets the environment.
        variables: of the environment.
    """
    # engines take the references; what runs kernels in the interpreter is for this process's own tests
    for name in ("KVARN_FORCE_TRITON", "TRITON_INTERPRET"):
        patch.delenv(name, raising=False)
    # one core a rank: neither engine puts two on a socket by itself
    bound = dict.fromkeys(("SGLANG_CPU_OMP_THREADS_BIND", "VLLM_CPU_OMP_THREADS_BIND"), "0|1")
    for name, value in {**variables, **bound, trail.FOLDER: str(folder)}.items():
        patch.setenv(name, value)
    text = torch.randint(3, VOCABULARY, (4 * LONGEST,), generator=torch.Generator().manual_seed(5)).tolist()
    traffic = {"folder": str(folder), "ranks": RANKS, "steps": STEPS, "text": text}
    traffic |= {"requests": 2 * REQUESTS, "longest": LONGEST, "new_tokens": ANSWERS}
    found = run_job(engine, {"engine": arguments, "traffic": traffic}, folder, "traffic")
    return [trail.Report(**report) for report in found["traffic"]]


def check(reports: list[trail.Report]) -> None:
    """Assert that the ranks decided the same, and that there was something to decide."""
    assert len(reports) == RANKS
    assert trail.first_difference(reports) is None
    assert reports[0].steps >= STEPS
    assert reports[0].sealed > REQUESTS
    assert reports[0].hits > 0
