"""Rows of serving benchmarks: made from what a client measured, found again by what they have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvarn.bench.engines import ClientReport, Counters
from kvarn.bench.workloads import Run, slope

BASELINE = "auto"
"""The engine's name for a cache in the model's dtype."""
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """What rows that may be compared have in common.

    Args:
        engine: name of the engine.
        model: name of the model or shape.
        weights: real, or dummy for random ones.
        gpu: name of the GPU, none without one.
        scale: factor on the workloads; only 1 measures the load that a workload's name says.
        arguments: of the server, beside model and cache dtype, after KVarN's variables of the environment that change
            answers or figures.
    """

    engine: str
    model: str
    weights: str
    gpu: str
    scale: float
    arguments: str

    def has(self, row: Row) -> bool:
        """Tell whether a row was measured so."""
        return all(row.get(name) == value for name, value in asdict(self).items())


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a client, measured.

    Args:
        run: what was asked.
        report: what the client measured.
        counted: what the server counted meanwhile.
    """

    run: Run
    report: ClientReport
    counted: Counters


def find(rows: Iterable[Row], setting: Setting, dtype: str, workload: str) -> Row | None:
    """Return the row of a dtype and workload, if there is one."""
    named = (row for row in rows if row["dtype"] == dtype and row["workload"] == workload)
    return next((row for row in named if setting.has(row)), None)


def row_of(
    setting: Setting, dtype: str, workload: str, measured: Sequence[Measured], kv_tokens: int, baseline: Row | None
) -> Row:
    """Return the row of a workload.

    Args:
        setting: what it shares with others.
        dtype: cache dtype.
        workload: name.
        measured: its runs; throughput and latency are those of the last, in a slope that of the longest context.
        kv_tokens: tokens that the cache holds.
        baseline: row of the baseline; None if this is it.
    """
    last = measured[-1].report
    tok_s = last.output_tokens / last.duration_s
    prompt_tokens = sum(each.counted.prompt_tokens for each in measured)
    hit_tokens = sum(each.counted.hit_tokens for each in measured)
    row = {
        **asdict(setting),
        "dtype": dtype,
        "workload": workload,
        "kv_tokens": kv_tokens,
        "capacity_ratio": kv_tokens / baseline["kv_tokens"] if baseline else 1.0,
        "requests": sum(each.run.requests for each in measured),
        "tok_s": tok_s,
        "tok_s_ratio": tok_s / baseline["tok_s"] if baseline else 1.0,
        "ttft_p50_ms": last.ttft_p50_ms,
        "ttft_p99_ms": last.ttft_p99_ms,
        "itl_p50_ms": last.itl_p50_ms,
        "itl_p99_ms": last.itl_p99_ms,
        "slope_us_per_ktoken": None,
        "hit_rate": hit_tokens / prompt_tokens if prompt_tokens else None,
        "preemptions": int(sum(each.counted.preemptions for each in measured)),
    }
    if len(measured) > 1:
        contexts = [each.run.input_tokens for each in measured]
        latencies = [each.report.itl_p50_ms for each in measured]
        row["slope_us_per_ktoken"] = slope(contexts, latencies)
        row |= {f"itl_p50_ms_at_{context}": at for context, at in zip(contexts, latencies, strict=True)}
    return row
