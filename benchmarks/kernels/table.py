"""The table that people read: a line a case as it is measured, then a line a bar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.kernels.bars import Verdict, tally

_COLUMNS = (
    ("case", 34), ("us", 8), ("p10-p90", 15), ("TB/s", 6), ("limit", 6), ("fp16 us", 15), ("fp8 us", 15),
    ("turboq us", 15), ("step", 6), ("err", 7),
)  # fmt: skip


def header(limit_tbps: float) -> str:
    """Return the lines above the table."""
    names = "  ".join(name.ljust(width) if name == "case" else name.rjust(width) for name, width in _COLUMNS)
    return (
        f"Read bandwidth {limit_tbps:.3f} TB/s. us: one layer, the whole operation; TB/s: of packed bytes; "
        f"(x): time of the fastest peer over ours; step: building the step, once for all layers.\n\n{names}  verdict"
    )


def line(row: dict[str, Any], judged: Iterable[Verdict]) -> str:
    """Return a case's line: every bar that it loses is told."""
    cells = [
        row["case"],
        _number(row["us"], 1),
        "" if row["us"] is None else f"{row['us_p10']:.1f}-{row['us_p90']:.1f}",
        _number(row["packed_tbps"], 2),
        "" if row["of_limit"] is None else f"{row['of_limit']:.0%}",
        *(_peer(row, kind) for kind in ("fp16", "fp8", "turboquant")),
        _number(row["step_us"], 0),
        "" if row["rel_err"] is None else f"{row['rel_err']:.1e}",
    ]
    widths = [width for _, width in _COLUMNS]
    padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
    return "  ".join(padded) + "  " + (row["failed"] and f"FAILED {row['failed']}" or _verdict(judged))


def summary(judged: Iterable[Verdict], rows: Iterable[dict[str, Any]]) -> str:
    """Return the lines below the table: bars, failures, and why peers are missing."""
    rows = list(rows)
    lines = ["", "bar".ljust(48) + "pass  LOSE  not measured"]
    lines += [f"{bar.name:48}{won:4}  {lost:4}  {rest:12}" for bar, won, lost, rest in tally(judged)]
    lines += ["", *(f"FAILED {row['case']}: {row['failed']}" for row in rows if row["failed"])]
    reasons: dict[str, int] = {}
    for row in rows:
        for reason in filter(None, row["peers_missing"].split("; ")):
            reasons[reason] = reasons.get(reason, 0) + 1
    return "\n".join(lines + [f"peer missing in {count} cases: {reason}" for reason, count in reasons.items()])


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _peer(row: dict[str, Any], kind: str) -> str:
    us, ratio = row[f"{kind}_us"], row[f"vs_{kind}"]
    return "-" if us is None else f"{us:.1f} ({ratio:.2f}x)"


def _verdict(judged: Iterable[Verdict]) -> str:
    judged = list(judged)
    lost = [str(verdict) for verdict in judged if verdict.passed is False]
    return "; ".join(lost) or ("pass" if any(verdict.passed for verdict in judged) else "not measured")
