"""Bars: what a row must reach, in one table, and the verdicts on it. A value that is missing passes no bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels.cases import MAIN_PRESET, Case

ERROR_BAR = 2e-3
_LARGE_SHAPES = ("16x16k", "16x32k", "64x16k", "64x32k")


@dataclass(frozen=True, slots=True)
class Bar:
    """One demand on some of the cases.

    Args:
        name: what is demanded, for people.
        key: the key of a row that is judged.
        bound: the value that must be reached.
        applies: which cases are judged.
        at_most: the bound is an upper one.
    """

    name: str
    key: str
    bound: float
    applies: Callable[[Case], bool]
    at_most: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar's judgement of one row: passed is None where there is nothing to judge."""

    bar: Bar
    value: float | None
    passed: bool | None

    def __str__(self) -> str:
        """Say what was reached and what was demanded."""
        relation = "<=" if self.bar.at_most else ">="
        value = "none" if self.value is None else f"{self.value:.3g}"
        word = {True: "pass", False: "LOSE", None: "not measured"}[self.passed]
        return f"{word} {self.bar.key} {value}{relation}{self.bar.bound:g}"


def _plain(case: Case) -> bool:
    """One query row, no cap, no tile filled, fp16."""
    return case.q_len == 1 and not case.logit_cap and not case.sealing and case.dtype == "float16"


def _main(case: Case) -> bool:
    """The table that the README quotes: main preset, 8 kv heads, head_dim 128, GQA 4 and 8, equal lengths."""
    in_preset = case.preset == MAIN_PRESET and case.head_dim == 128
    return _plain(case) and in_preset and case.kv_heads == 8 and case.group in (4, 8) and case.uniform


def _large(case: Case) -> bool:
    return _main(case) and case.shape in _LARGE_SHAPES


def _single(context: str) -> Callable[[Case], bool]:
    return lambda case: _main(case) and case.shape == f"1x{context}"


def _head_dim(head_dim: int) -> Callable[[Case], bool]:
    return lambda case: _plain(case) and case.head_dim == head_dim


def _verified(case: Case) -> bool:
    return case.q_len == 4 and case.kv_heads == 8


def _preset(*names: str) -> Callable[[Case], bool]:
    return lambda case: _plain(case) and case.preset.removeprefix("kvarn_") in names


BARS = (
    Bar("large batches read at 85 % of the limit", "of_limit", 0.85, _large),
    Bar("large batches 3.9 times as fast as fp16", "vs_fp16", 3.9, _large),
    Bar("large batches 1.9 times as fast as fp8", "vs_fp8", 1.9, _large),
    Bar("batch 1 at 4k twice as fast as fp16", "vs_fp16", 2.0, _single("4k")),
    Bar("batch 1 at 32k 3 times as fast as fp16", "vs_fp16", 3.0, _single("32k")),
    Bar("batch 1 at 128k 3.7 times as fast as fp16", "vs_fp16", 3.7, _single("128k")),
    Bar("never slower than fp16", "vs_fp16", 1.0, _plain),
    Bar("ragged batches read at 70 % of the limit", "of_limit", 0.70, lambda case: _plain(case) and not case.uniform),
    Bar("GQA 16 reads at 75 % of the limit", "of_limit", 0.75, lambda case: _plain(case) and case.group == 16),
    Bar("k4v4 reads at 75 % of the limit", "of_limit", 0.75, _preset("k4v4_g128", "k4v4_g64")),
    Bar("tiles of 64 read at 75 % of the limit", "of_limit", 0.75, _preset("k4v2_g64", "k4v4_g64")),
    Bar("k8v4 reads at 75 % of the limit", "of_limit", 0.75, _preset("k8v4_g128")),
    Bar("k2v2 reads at 75 % of the limit", "of_limit", 0.75, _preset("k2v2_g128")),
    Bar("head_dim 64 reads at 75 % of the limit", "of_limit", 0.75, _head_dim(64)),
    Bar("head_dim 256 reads at 75 % of the limit", "of_limit", 0.75, _head_dim(256)),
    Bar("4 query rows take 1.4 times as long as one", "vs_q_len_1", 1.4, _verified, at_most=True),
    Bar("error against float64", "gate_err", ERROR_BAR, lambda case: True, at_most=True),
)


def verdicts(case: Case, row: dict[str, Any]) -> list[Verdict]:
    """Return the verdict of every bar that applies to a case."""
    return [_judge(bar, row[bar.key]) for bar in BARS if bar.applies(case)]


def _judge(bar: Bar, value: float | None) -> Verdict:
    if value is None:
        return Verdict(bar, None, None)
    return Verdict(bar, value, value <= bar.bound if bar.at_most else value >= bar.bound)


def tally(judged: Iterable[Verdict]) -> list[tuple[Bar, int, int, int]]:
    """Count verdicts: every bar with how often it was passed, lost and not measured."""
    judged = list(judged)
    counts = []
    for bar in BARS:
        results = [verdict.passed for verdict in judged if verdict.bar is bar]
        counts.append((bar, results.count(True), results.count(False), results.count(None)))
    return counts
