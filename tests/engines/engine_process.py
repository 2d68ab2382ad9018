"""Run a driver, or SGLang's own launcher, in a process of its own, with an environment that is known."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import instruments
from plan import Answer, Chunk, Results, Step, write_plan
from tiny_models import TinyModel

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_STAND_INS = _ROOT / "tools" / "sglang_cpu"
_PLAN_TIMEOUT_S = 400
# A refusal takes the time of importing SGLang; a server that does start goes on for good.
_LAUNCH_TIMEOUT_S = 150
# What would change the engine under test: our own switches, those of the kernel tests, and those of other engines.
_FOREIGN = ("KVARN_", "SGLANG_", "ENGINE_TEST_", "TRITON_INTERPRET", "PYTEST_")


@dataclass(frozen=True, slots=True)
class Models:
    """The tiny models.

    Args:
        folder: where they are saved.
        references: greedy answers of transformers, by model name.
    """

    folder: Path
    references: dict[str, list[list[int]]]

    def path(self, model: TinyModel) -> Path:
        """Return the folder of a model."""
        return self.folder / model.name

    def scratch(self, name: str) -> Path:
        """Return a folder of this test session for what a process writes."""
        return self.folder.parent / name


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """An engine and the environment that it runs in.

    Args:
        model: folder of the model.
        options: arguments of ``sglang.Engine`` beside those that all engines here share.
        variables: environment variables beside those that all engines here share.
        overlay: folder with another SGLang, found before the installed one.
    """

    model: Path
    options: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    overlay: Path | None = None

    @property
    def engine(self) -> dict[str, Any]:
        """Arguments of ``sglang.Engine``."""
        shared = {
            "model_path": str(self.model),
            "device": "cpu",
            "dtype": "float32",
            "kv_cache_dtype": "kvarn_k4v2_g128",
            "context_length": 2048,
            "max_total_tokens": 2048,
            "chunked_prefill_size": 128,
            "log_level": "info",
            "skip_server_warmup": True,
        }
        return shared | self.options


def environment(overlay: Path | None = None, **variables: str) -> dict[str, str]:
    """Return the environment of an engine process: this one's, without what would change the engine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    # this checkout's KVarN, wherever the environment's was installed from
    paths = [_ROOT, _STAND_INS, *([overlay] if overlay else [])]
    return kept | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # SGLang's own audits: pages that are free and in use at once, or neither, stop the scheduler.
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
        "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
        **variables,
    }


def run_plan(setup: EngineSetup, steps: list[Step], folder: Path) -> Results:
    """Carry out a plan on a fresh engine, once in a test session.

    Args:
        setup: the engine.
        steps: the plan.
        folder: for what passes between the processes.

    Raises:
        RuntimeError: the driver failed; ends with the engine's last lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan, results, trace = (folder / name for name in ("plan.json", "results.json", "trace.jsonl"))
    write_plan(plan, setup.engine, steps)
    variables = environment(setup.overlay, **{instruments.TRACE: str(trace), **setup.variables})
    command = [sys.executable, str(_HERE / "driver.py"), str(plan), str(results)]
    code, said = _run_once(command, variables, folder, _PLAN_TIMEOUT_S)
    if not results.exists():
        tail = "\n".join(said.splitlines()[-60:])
        raise RuntimeError(f"The driver ended with {code} and no results:\n{tail}")
    found = json.loads(results.read_text())
    lines = trace.read_text().splitlines() if trace.exists() else []
    return Results(
        answers={name: Answer(**answer) for name, answer in found["answers"].items()},
        flushed=found["flushed"],
        chunks=[Chunk(**json.loads(line)) for line in lines],
        log=said,
    )


def make_models(folder: Path) -> Models:
    """Save the tiny models into a folder, and ask transformers, once in a test session.

    Raises:
        RuntimeError: that failed; ends with what it said.
    """
    reference = folder / "reference.json"
    command = [sys.executable, str(_HERE / "tiny_models.py"), str(folder), str(reference)]
    code, said = _run_once(command, environment(), folder, _LAUNCH_TIMEOUT_S)
    if code:
        raise RuntimeError(f"The models could not be made:\n{said}")
    return Models(folder, json.loads(reference.read_text()))


def launch_server(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Run ``python -m sglang.launch_server``, once in a test session; returns its exit code and all that it said."""
    command = [sys.executable, "-m", "sglang.launch_server", *arguments]
    return _run_once(command, environment(), folder, _LAUNCH_TIMEOUT_S)


def _run_once(command: list[str], variables: dict[str, str], folder: Path, timeout_s: int) -> tuple[int, str]:
    """Run a command unless another worker of pytest-xdist ran it into this folder; returns exit code and output."""
    folder.mkdir(parents=True, exist_ok=True)
    code, log = folder / "exit_code", folder / "log.txt"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not code.exists():
            code.write_text(str(_run(command, variables, log, timeout_s)))
    return int(code.read_text()), log.read_text(errors="replace")


def _run(command: list[str], variables: dict[str, str], log: Path, timeout_s: int) -> int:
    """Run to the end, or end it and everything that it started; returns the exit code."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            _end_group(process.pid)
            process.wait()


def _end_group(leader: int) -> None:
    """End the processes of a session that we started; none may be left."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return
