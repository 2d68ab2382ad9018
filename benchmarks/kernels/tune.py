"""Tune: measure decode attention under many launch shapes, every one behind the gate."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.kernels.cases import Case
from benchmarks.kernels.inputs import make_inputs
from benchmarks.kernels.measure import Bench
from benchmarks.kernels.workload import Workload, build
from kvarn import results
from kvarn.core import attend
from kvarn.core.attend import LaunchShape

_MEASURED = ("us", "us_p10", "us_p90", "attend_us", "of_limit", "gate_err")
_LAUNCH = "{warps} warps, {stages} stages, {programs_per_sm} programs, {registers} registers, {room_kib} KiB"
_TOOK = "{us:.1f} us ({attend_us:.1f} attention), {of_limit:.0%}, error {gate_err:.1e}"


def shapes(
    warps: Sequence[int],
    stages: Sequence[int],
    programs: Sequence[int],
    registers: Sequence[int] = (0,),
    rooms: Sequence[int] = (0,),
) -> list[LaunchShape]:
    """Return every combination; 0 registers are no limit."""
    combinations = itertools.product(warps, stages, programs, registers, rooms)
    return [LaunchShape(w, s, p, r or None, room) for w, s, p, r, room in combinations]


@contextmanager
def launched_as(shape: LaunchShape) -> Iterator[None]:
    """Launch the attention kernel in this shape, whatever the head width."""
    chosen = attend.launch_shape
    attend.launch_shape = lambda *_: shape
    try:
        yield
    finally:
        attend.launch_shape = chosen


def compile_all(cases: Sequence[Case], tried: Sequence[LaunchShape]) -> None:
    """Compile every kernel in processes of its own. What fails says why when it is measured."""
    kernels = sorted({(s.warps, s.stages, s.programs_per_sm, s.registers or 0, s.room_kib) for s in tried})
    command = [sys.executable, "-m", "benchmarks.kernels", "warm"]
    jobs = [[*command, case.name, "--shape", *map(str, kernel)] for case in cases for kernel in kernels]
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        list(pool.map(lambda job: subprocess.run(job, capture_output=True, check=False), jobs))


def run(cases: Sequence[Case], tried: Sequence[LaunchShape], bench: Bench, out: Path, deadline: float) -> None:
    """Measure every case in every shape; print the rows, fastest first, and write them.

    Args:
        cases: what to measure.
        tried: launch shapes.
        bench: what all cases share.
        out: result file.
        deadline: `time.monotonic` after which no case is begun.
    """
    rows: list[dict[str, Any]] = []
    for case in cases:
        if time.monotonic() > deadline:
            print(f"{case.name}: not begun, out of time")
            continue
        workload = build(make_inputs(case, bench.device, bench.pool_tiles), bench.l2_bytes, bench.table_tokens)
        measured = [{"case": case.name, **_measure(workload, shape, bench)} for shape in tried]
        for row in sorted(measured, key=lambda row: row["us"] or float("inf")):
            print(f"{case.name}: {_LAUNCH.format(**row)}: {row['failed'] or _TOOK.format(**row)}", flush=True)
        rows += measured
        results.write(out, rows)


def _measure(workload: Workload, shape: LaunchShape, bench: Bench) -> dict[str, Any]:
    """Return the row of one shape; times are null if the output is wrong or the kernel can't be launched so."""
    row: dict[str, Any] = {**asdict(shape), **dict.fromkeys(_MEASURED), "failed": ""}
    try:
        with launched_as(shape):
            check = workload.check()
            row["gate_err"] = check.own_error
            if not check.passed:
                row["failed"] = f"error {check.own_error:.1e} against float64"
                return row
            timing = bench.timer(workload.run, len(workload.layers))
            row["attend_us"] = bench.timer(workload.parts()["attend"], len(workload.layers)).us
    except Exception as error:  # noqa: BLE001 (whatever it is, the other shapes are still to be measured)
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        return row
    packed_tbps = workload.traffic.total / timing.us / 1e6
    row.update(us=timing.us, us_p10=timing.us_p10, us_p90=timing.us_p90, of_limit=packed_tbps / bench.limit_tbps)
    return row
