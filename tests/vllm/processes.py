"""Run vLLM in processes of its own, and end them and all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ask_vllm import Found, read_found

# Models, plans and comparisons are those of the SGLang tests.
_HELPERS = str(Path(__file__).parents[1] / "engines")
DRIVER = Path(__file__).parent / "ask_vllm.py"
# Most of it goes into importing vLLM.
TIMEOUT_S = 300
_END_S = 20


@contextmanager
def started(command: list[str], log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in the environment of this folder's engines, and end everything that is left of it.

    Args:
        command: arguments of this Python.
        log: where standard output and error go.
        variables: environment variables beside those that all engines here share.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([variables.pop("PYTHONPATH", ""), _HELPERS]).lstrip(os.pathsep)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            # Asked to end first, because shared memory is left behind by what is killed.
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(command: list[str], log: Path, **variables: str) -> tuple[int, str]:
    """Run a command to its end; returns its exit code and all that it said. Negative if it was ended for its time."""
    with started(command, log, **variables) as process:
        try:
            code = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
    return code, log.read_text(errors="replace")


def ask_elsewhere(model: Path, folder: Path, options: str = "{}", **variables: str) -> Found:
    """Run ``ask_vllm.py``.

    Raises:
        RuntimeError: it failed; ends with what it said.
    """
    results = folder / "results.json"
    command = [str(DRIVER), str(model), str(results), options]
    code, said = run(command, folder / "log.txt", **variables)
    if code:
        raise RuntimeError(f"vLLM ended with {code}:\n" + "\n".join(said.splitlines()[-60:]))
    return read_found(results)
