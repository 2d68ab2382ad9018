"""The picture of serving benchmarks: throughput against capacity, with each cache dtype's KL, a panel an engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvarn.bench.report import is_serving
from kvarn.bench.rows import Row
from kvarn.presets import is_preset_name
from kvarn.svg import COLOURS, GRID, document, legend, line, point, text

_WIDTH, _HEIGHT, _LEGEND = 440, 340, 26
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 110, 34, 40
# The load whose throughput is shown: the one that more capacity is for.
_WORKLOAD = "burst"
_GROUPS = ("KVarN", "other caches")
# Radius of a cache without a measured KL, and what each power of ten of KL above the least shown adds to it.
_RADIUS, _RADIUS_A_POWER, _LEAST_POWER = 3.0, 2.5, -4
# Names under which other quantisers' KL stands in rows of `kvarn eval`.
_EVALUATED_AS = {"fp8": "fp8-e4m3", "fp8_e4m3": "fp8-e4m3"}


@dataclass(frozen=True, slots=True)
class _Panel:
    """Axes from 0 to the highest whole ratio."""

    left: float
    capacity_high: int
    throughput_high: int

    def x(self, ratio: float) -> float:
        return self.left + _LEFT + ratio / self.capacity_high * (_WIDTH - _LEFT - _RIGHT)

    def y(self, ratio: float) -> float:
        return _HEIGHT - _BOTTOM - ratio / self.throughput_high * (_HEIGHT - _TOP - _BOTTOM)


def picture(rows: Sequence[Row]) -> str:
    """Return the picture as SVG; without rows of a burst at scale 1 it says that nothing was measured.

    Args:
        rows: of serving benchmarks, and others that tell the KL of a cache dtype or method, of which the first counts.
    """
    panels = _panels(rows)
    width, height = _WIDTH * max(1, len(panels)), _HEIGHT + _LEGEND
    if not panels:
        return document(width, height, [text(width / 2, height / 2, "not measured yet", 14)])
    parts: list[str] = []
    for index, (title, series) in enumerate(panels):
        parts += _draw(title, series, rows, index * _WIDTH)
    return document(width, height, [*parts, *legend(_GROUPS, COLOURS[: len(_GROUPS)], width, _HEIGHT + 10)])


def kl_of(dtype: str, rows: Iterable[Row]) -> float | None:
    """Return the mean KL of a cache dtype, in nats, from the first row that tells it; None if none does."""
    names = (dtype, _EVALUATED_AS.get(dtype, dtype))
    told = (row for row in rows if "kl_mean" in row and (row.get("method") or row.get("dtype")) in names)
    found: dict[str, Any] | None = next(told, None)
    return None if found is None else float(found["kl_mean"])


def _panels(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if is_serving(row) and row["workload"] == _WORKLOAD:
            panels.setdefault(f"{row['engine']}, {row['model']}, {row['gpu']}, {_WORKLOAD}", []).append(row)
    return sorted(panels.items())


def _draw(title: str, series: Sequence[Row], rows: Sequence[Row], left: float) -> list[str]:
    high = (math.ceil(max(row[name] for row in series)) for name in ("capacity_ratio", "tok_s_ratio"))
    panel = _Panel(left, *high)
    parts = [text(left + _WIDTH / 2, 18, title, 11)]
    for ratio in range(panel.throughput_high + 1):
        parts.append(line(panel.x(0), panel.y(ratio), panel.x(panel.capacity_high), panel.y(ratio), GRID))
        parts.append(text(panel.x(0) - 6, panel.y(ratio) + 4, str(ratio), 10, "end"))
    for ratio in range(panel.capacity_high + 1):
        parts.append(line(panel.x(ratio), panel.y(0), panel.x(ratio), panel.y(panel.throughput_high), GRID))
        parts.append(text(panel.x(ratio), panel.y(0) + 14, str(ratio), 10))
    parts.append(text(left + _WIDTH / 2, _HEIGHT - 8, "capacity, times the baseline's", 10))
    parts.append(text(left + 8, _TOP - 6, "output tokens/s, times the baseline's; larger discs: more KL", 10, "start"))
    for row in series:
        kl = kl_of(row["dtype"], rows)
        x, y = panel.x(row["capacity_ratio"]), panel.y(row["tok_s_ratio"])
        said = row["dtype"] if kl is None else f"{row['dtype']}, KL {kl:.4f}"
        colour = COLOURS[0 if is_preset_name(row["dtype"]) else 1]
        parts += [point(x, y, _radius(kl), colour, said), text(x + 10, y - 6, said, 10, "start")]
    return parts


def _radius(kl: float | None) -> float:
    return _RADIUS if not kl else round(_RADIUS + _RADIUS_A_POWER * max(0.0, math.log10(kl) - _LEAST_POWER), 1)
