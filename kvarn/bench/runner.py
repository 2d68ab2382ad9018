"""Measure cache dtypes one after another: a server each, every workload in it, a row as soon as one is done."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvarn import results
from kvarn.bench.engines import CacheFacts, ClientReport, Counters, Engine
from kvarn.bench.planned import model_dtype, planned_tokens
from kvarn.bench.rows import BASELINE, Measured, Row, Setting, find, row_of
from kvarn.bench.sanity import check_answer, check_cached, check_report
from kvarn.bench.server import (
    HOST,
    Server,
    ServerError,
    check_alive,
    choose_port,
    group,
    metrics,
    started,
    tail_of,
    wait_until_healthy,
)
from kvarn.bench.workloads import Run, Workload, runs
from kvarn.checkpoint import describe
from kvarn.errors import KVarNError

# Compiles and warms what the first requests would wait for; as many as a small batch, longer than a tile.
_WARM_UP = Run(300, 16, 8, rate=0, concurrency=8, prefix_tokens=0, sessions=0, seed=1)
_FILL_OUTPUT_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured, and how.

    Args:
        engine: the engine.
        model: checkpoint folder or hub name.
        config: the model's configuration, as in config.json.
        setting: what rows have in common.
        arguments: for the server of every cache dtype alike.
        cuda: whether the server runs on a GPU.
        out: result file.
        logs: folder for logs and what clients write.
        port: of the server; None takes any free one.
        start_timeout_s: until a server must be healthy.
        client_timeout_s: until a run of a client must be over.
        say: takes a line of progress.
    """

    engine: Engine
    model: str
    config: Mapping[str, Any]
    setting: Setting
    arguments: tuple[str, ...]
    cuda: bool
    out: Path
    logs: Path
    port: int | None
    start_timeout_s: float
    client_timeout_s: float
    say: Callable[[str], None]

    def run(self, dtypes: Sequence[str], workloads: Sequence[Workload]) -> list[Row]:
        """Measure what the result file has no row of, the baseline first; return all rows of the setting.

        Raises:
            KVarNError: a dtype could not be measured. The others were, unless it is the baseline.
        """
        failed = []
        for dtype in [BASELINE, *(dtype for dtype in dtypes if dtype != BASELINE)]:
            rows = results.read(self.out)
            missing = [w for w in workloads if find(rows, self.setting, dtype, w.name) is None]
            if not missing:
                self.say(f"{dtype}: nothing is missing in {self.out}")
                continue
            try:
                self._measure(dtype, missing)
            except KVarNError as error:
                if dtype == BASELINE:
                    raise
                self.say(f"{dtype}: {error}")
                failed.append(dtype)
        if failed:
            raise KVarNError(f"Not measured: {', '.join(failed)}, for the reasons above; the rest is in {self.out}.")
        return [row for row in results.read(self.out) if self.setting.has(row)]

    def _measure(self, dtype: str, workloads: Sequence[Workload]) -> None:
        port = choose_port(self.port)
        command = self.engine.command(self.model, dtype, HOST, port, cuda=self.cuda)
        command += [*self.engine.metrics_flags, *self.arguments]
        environment = self.engine.environment(self.model, cuda=self.cuda)
        log = self.logs / f"{self.engine.name}-{dtype}.log"
        self.say(f"$ {' '.join(command)}\nlog: {log}")
        with started(command, environment, port, log) as server:
            wait_until_healthy(server, self.start_timeout_s)
            facts = self.engine.facts(server.url)
            answer = check_answer(server.url, facts.model)
            self._say_answer(dtype, answer)
            drive = _Client(self, server, environment, dtype)
            drive(replace(_WARM_UP, input_tokens=_fitting(_WARM_UP, facts)), "warm-up")
            planned = self._planned(dtype, command, facts)
            for workload in workloads:
                row = self._row(dtype, workload, self._load(drive, workload, facts), facts)
                self._write({**row, "kv_tokens_planned": planned, "answer": answer})

    def _load(self, drive: _Client, workload: Workload, facts: CacheFacts) -> list[Measured]:
        """Run one workload."""
        longest = facts.longest or facts.tokens
        measured = []
        for run in runs(workload, self.setting.scale, self._baseline_tokens(facts), longest):
            label = f"{workload.name}-{run.input_tokens}"
            if run.cached:
                drive(replace(run, output_tokens=_FILL_OUTPUT_TOKENS), f"{label}-fill")
            before = drive.counters()
            report = drive(run, label)
            counted = drive.counters().since(before)
            check_cached(counted, run)
            measured.append(Measured(run, report, counted))
        return measured

    def _baseline_tokens(self, facts: CacheFacts) -> int:
        """Return what the baseline's cache holds: from its rows, or, where this is the baseline, from its server."""
        found = [row for row in results.read(self.out) if self.setting.has(row) and row["dtype"] == BASELINE]
        return int(found[0]["kv_tokens"]) if found else facts.tokens

    def _planned(self, dtype: str, command: Sequence[str], facts: CacheFacts) -> int | None:
        model = describe(self.config, model_dtype(command))
        return planned_tokens(dtype, model, facts, self._baseline_tokens(facts))

    def _row(self, dtype: str, workload: Workload, measured: Sequence[Measured], facts: CacheFacts) -> Row:
        baseline = find(results.read(self.out), self.setting, BASELINE, workload.name)
        return row_of(self.setting, dtype, workload.name, measured, facts.tokens, baseline)

    def _write(self, row: Row) -> None:
        results.write(self.out, [*results.read(self.out), row], self.engine.name)
        ratio = f"{row['tok_s_ratio']:.2f} of {BASELINE}"
        self.say(f"{row['dtype']}, {row['workload']}: {row['tok_s']:.1f} output tokens/s, {ratio}")

    def _say_answer(self, dtype: str, answer: str) -> None:
        self.say(f"{dtype} answers    {answer!r}")
        found = [row for row in results.read(self.out) if self.setting.has(row) and row["dtype"] == BASELINE]
        if found and dtype != BASELINE:
            self.say(f"{BASELINE} answered {found[0]['answer']!r}")


@dataclass(frozen=True, slots=True)
class _Client:
    """Runs the engine's client against one server."""

    bench: Bench
    server: Server
    environment: Mapping[str, str]
    dtype: str

    def __call__(self, run: Run, label: str) -> ClientReport:
        bench = self.bench
        out = (bench.logs / f"{bench.engine.name}-{self.dtype}-{label}.json").absolute()
        # The clients append to what is there.
        out.unlink(missing_ok=True)
        log = out.with_suffix(".log")
        command = bench.engine.client(run, self.server.url, bench.model, out)
        with group(command, self.environment, log) as process:
            try:
                code = process.wait(bench.client_timeout_s)
            except subprocess.TimeoutExpired as error:
                raise ServerError(
                    f"The client was not done after {bench.client_timeout_s:g} s; --client-timeout gives it longer, "
                    f"--scale less to do.\n{tail_of(log)}"
                ) from error
        check_alive(self.server)
        if code:
            raise ServerError(_why(code, log))
        report = bench.engine.report(out)
        check_report(report, run)
        return report

    def counters(self) -> Counters:
        """Return what the server has counted so far."""
        return self.bench.engine.counters(metrics(self.server.url))


def _fitting(run: Run, facts: CacheFacts) -> int:
    """Return the prompt length of a run, shortened to what the server takes."""
    return min(run.input_tokens, (facts.longest or facts.tokens) - run.output_tokens)


def _why(code: int, log: Path) -> str:
    said = log.read_text(errors="replace")
    if missing := re.search(r"No module named '([\w.]+)'", said):
        return (
            f"The engine's benchmark client needs the package {missing[1]}, which is not installed; install it, or "
            f'all that it needs by pip install "kvarn[bench]".'
        )
    return f"The engine's benchmark client ended with exit code {code}; its log {log} ends:\n{tail_of(log)}"
