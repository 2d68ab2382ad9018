"""Decode attention: run the cases, print the table, write the result file."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels import table
from benchmarks.kernels.bars import Verdict, verdicts
from benchmarks.kernels.cases import Case, single_row
from benchmarks.kernels.measure import Bench, DeviceLost, empty_row, measure_case
from kvarn import results

# A run that is killed keeps what it measured up to the last of so many cases.
_SAVE_EVERY = 8
_DIGITS = 6


def run(cases: Sequence[Case], bench: Bench, out: Path, deadline: float = float("inf")) -> bool:
    """Measure cases one after the other.

    Args:
        cases: what to measure, in this order.
        bench: what all cases share.
        out: result file.
        deadline: `time.monotonic` after which no case is begun.

    Returns:
        Whether every case was measured and passed the gate.
    """
    rows: dict[Case, dict[str, Any]] = {}
    judged: list[Verdict] = []
    print(table.header(bench.limit_tbps), flush=True)
    stopped = ""
    for case in cases:
        row = rows[case] = empty_row(case, bench)
        if not stopped and time.monotonic() > deadline:
            stopped = "not begun: out of time"
        if stopped:
            row["failed"] = stopped
        else:
            stopped = _measure(case, bench, row)
            _compare_with_single_row(case, rows)
        verdict = verdicts(case, row)
        judged += verdict
        row["bars"] = "; ".join(map(str, verdict))
        print(table.line(row, verdict), flush=True)
        if len(rows) % _SAVE_EVERY == 0:
            _save(out, rows)
    _save(out, rows)
    print(table.summary(judged, rows.values()), flush=True)
    return not any(row["failed"] for row in rows.values())


def _measure(case: Case, bench: Bench, row: dict[str, Any]) -> str:
    """Measure a case; return why nothing can be measured after it, if so."""
    try:
        measure_case(case, bench, row)
    except DeviceLost as error:
        row["failed"] = f"the GPU's context broke: {error}"
        return f"not begun: the GPU's context broke in {case.name}"
    return ""


def _compare_with_single_row(case: Case, rows: dict[Case, dict[str, Any]]) -> None:
    """Set how much longer several query rows take than one, if both were measured."""
    single = rows.get(single_row(case))
    if case.q_len > 1 and single and single["us"] and rows[case]["us"]:
        rows[case]["vs_q_len_1"] = rows[case]["us"] / single["us"]


def _save(out: Path, rows: dict[Case, dict[str, Any]]) -> None:
    results.write(out, [{key: _rounded(value) for key, value in row.items()} for row in rows.values()])


def _rounded(value: Any) -> Any:
    """Shorten a number; JSON has none that isn't finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
