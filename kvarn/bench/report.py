"""Tables of serving benchmarks, for a terminal and for a document, and where KVarN is slower."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from kvarn.bench.rows import BASELINE, Row
from kvarn.bench.workloads import WORKLOADS
from kvarn.presets import is_preset_name

BEGIN = "<!-- kvarn plot serving: begin -->"
END = "<!-- kvarn plot serving: end -->"
NOT_MEASURED = "Not measured yet: there is no result file with rows at scale 1.\n"
_HEADER = (
    "| Cache | KV tokens (planned) | of the baseline | tokens/s | of the baseline | first token ms, p50 / p99 "
    "| between tokens ms, p50 / p99 | slope us per 1,000 tokens | prefix hits | preemptions |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def is_serving(row: Row) -> bool:
    """Tell whether a row is one of a serving benchmark at the load that its workload's name says."""
    return "workload" in row and row["scale"] == 1


def table(rows: Iterable[Row]) -> str:
    """Return the tables of all rows, whatever their scale, one for each engine, model, arguments and workload."""
    lines: list[str] = []
    for title, series in _by_load(rows):
        lines += [f"### {title}", "", *_HEADER, *map(_line, series), ""]
    return "\n".join(lines)


def tables(rows: Iterable[Row]) -> str:
    """Return what a document shows of rows: the tables, then the cases that KVarN loses; rows at scale 1 alone."""
    measured = [row for row in rows if is_serving(row)]
    if not measured:
        return NOT_MEASURED
    lost = [f"- {said}" for said in losing_cases(measured)]
    return "\n".join([table(measured), "### Where KVarN is slower", "", *(lost or ["Nowhere among these."]), ""])


def losing_cases(rows: Iterable[Row]) -> list[str]:
    """Return a line for every figure of a preset that is worse than that of another cache dtype, on the same load."""
    found = []
    for title, series in _by_load(rows):
        others = [row for row in series if not is_preset_name(row["dtype"])]
        for row in (row for row in series if is_preset_name(row["dtype"])):
            for other in others:
                worse = _worse(row, other)
                if worse:
                    found.append(f"{title}: `{row['dtype']}` to `{other['dtype']}`: {', '.join(worse)}")
    return found


def _worse(row: Row, other: Row) -> list[str]:
    said = []
    if row["tok_s"] < other["tok_s"]:
        said.append(f"{row['tok_s']:,.0f} tokens/s against {other['tok_s']:,.0f}")
    for name, about in (
        ("ttft_p99_ms", "ms to the first token (p99)"),
        ("itl_p50_ms", "ms between tokens (p50)"),
        ("slope_us_per_ktoken", "us per 1,000 tokens of context"),
    ):
        mine, theirs = row[name], other[name]
        if mine is not None and theirs is not None and mine > theirs:
            said.append(f"{mine:,.1f} {about} against {theirs:,.1f}")
    return said


def _by_load(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    order = list(WORKLOADS)
    ordered = sorted(rows, key=lambda row: (_series(row), order.index(row["workload"]), row["dtype"] != BASELINE))
    return [
        (_title(series, workload), list(group))
        for (series, workload), group in groupby(ordered, key=lambda row: (_series(row), row["workload"]))
    ]


def _series(row: Row) -> tuple[str, str, str, str, float, str]:
    return row["engine"], row["model"], row["weights"], row["gpu"], row["scale"], row["arguments"]


def _title(series: tuple[str, str, str, str, float, str], workload: str) -> str:
    engine, model, weights, gpu, scale, arguments = series
    parts = [engine, model if weights == "real" else f"{model} with random weights", workload]
    parts += [gpu] if gpu != "none" else []
    parts += [f"scale {scale:g}"] if scale != 1 else []
    return ", ".join([*parts, *([f"`{arguments}`"] if arguments else [])])


def _line(row: Row) -> str:
    cells = [
        f"**`{row['dtype']}`**" if is_preset_name(row["dtype"]) else f"`{row['dtype']}`",
        f"{row['kv_tokens']:,}" + (f" ({row['kv_tokens_planned']:,})" if row["kv_tokens_planned"] else ""),
        f"{row['capacity_ratio']:.2f}",
        f"{row['tok_s']:,.1f}",
        f"{row['tok_s_ratio']:.2f}",
        f"{row['ttft_p50_ms']:,.0f} / {row['ttft_p99_ms']:,.0f}",
        f"{row['itl_p50_ms']:.2f} / {row['itl_p99_ms']:.2f}",
        "" if row["slope_us_per_ktoken"] is None else f"{row['slope_us_per_ktoken']:.2f}",
        "" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}",
        str(row["preemptions"]),
    ]
    return f"| {' | '.join(cells)} |"
