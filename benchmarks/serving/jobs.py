"""Jobs for an engine in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class EngineFailed(Exception):
    """An engine didn't do what it was asked to; says its last words."""


def run_job(
    engine: str, job: dict[str, Any], work: Path, name: str, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return the result of a job that `benchmarks.serving.worker` does.

    Args:
        engine: one of `engines.ENGINES`.
        job: what the worker is to do.
        work: folder for files.
        name: of the job, for file names. Logs stay in the folder that KVARN_BENCH_LOGS names.
        environment: more variables of the worker.

    Raises:
        EngineFailed: the worker ended without a result.
    """
    path, result = work / f"{name}.json", work / f"{name}.result.json"
    path.write_text(json.dumps({**job, "result": str(result)}))
    log_dir = Path(os.environ.get("KVARN_BENCH_LOGS", work))
    with (log_dir / f"{name}.log").open("w") as log:
        command = [sys.executable, "-m", "benchmarks.serving.worker", engine, str(path)]
        variables = {**os.environ, **(environment or {})}
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, env=variables).returncode
    if code or not result.exists():
        said = (log_dir / f"{name}.log").read_text()[-4000:]
        raise EngineFailed(f"The engine for {name} failed with code {code}:\n{said}")
    answer: dict[str, Any] = json.loads(result.read_text())
    return answer
