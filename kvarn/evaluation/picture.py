"""The picture of a document: KL against bytes, one panel a model, as SVG drawn from what `kvarn eval` measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvarn.evaluation.names import family, is_variant_name
from kvarn.evaluation.report import Row, by_series
from kvarn.presets import is_preset_name
from kvarn.svg import COLOURS, GRID, document, legend, line, point, text

_WIDTH, _HEIGHT = 340, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 34, 40
_LEGEND = 26
_OURS = "KVarN"
_BYTE_TICKS = 20


@dataclass(frozen=True, slots=True)
class _Panel:
    """Axes of one panel: bytes from low to high, powers of ten of KL from low to high."""

    left: float
    bytes_low: float
    bytes_high: float
    power_low: int
    power_high: int

    def x(self, count: float) -> float:
        share = (count - self.bytes_low) / (self.bytes_high - self.bytes_low)
        return self.left + _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, kl: float) -> float:
        share = (math.log10(kl) - self.power_low) / (self.power_high - self.power_low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def picture(rows: Iterable[Row]) -> str:
    """Return the picture as SVG: for each model the series with the most methods, the longest of these."""
    panels = _panels(rows)
    methods = {_family(row) for _, series in panels for row in series}
    names = [_OURS, *sorted(methods - {_OURS})]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    width, height = _WIDTH * max(1, len(panels)), _HEIGHT + _LEGEND
    parts = []
    for index, (title, series) in enumerate(panels):
        parts += _draw(title, series, index * _WIDTH, colours)
    parts += legend(names, [colours[name] for name in names], width, _HEIGHT + 10)
    return document(width, height, parts)


def _panels(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    best: dict[str, tuple[str, list[Row]]] = {}
    shown = [row for row in rows if row.get("kl_mean", 0) > 0 and not is_variant_name(row["method"])]
    for (model, name, tokens, _), series in by_series(shown):
        before = best.get(model, ("", []))[1]
        if (len(series), tokens) > (len(before), before[0]["tokens"] if before else 0):
            best[model] = f"{model}, {name}, {tokens:,} tokens", series
    return [best[model] for model in sorted(best)]


def _family(row: Row) -> str:
    return _OURS if is_preset_name(row["method"]) else family(row["method"])


def _draw(title: str, series: Sequence[Row], left: float, colours: dict[str, str]) -> list[str]:
    counts = [row["bytes_per_token_head"] for row in series]
    powers = [math.log10(row["kl_mean"]) for row in series]
    step = _BYTE_TICKS if max(counts) < 150 else 2 * _BYTE_TICKS
    low, high = math.floor(min(counts) / step - 0.1) * step, math.ceil(max(counts) / step + 0.1) * step
    power_low = math.floor(min(powers))
    panel = _Panel(left, low, high, power_low, max(math.ceil(max(powers)), power_low + 1))
    parts = [text(left + _WIDTH / 2, 18, title, 11)]
    for power in range(panel.power_low, panel.power_high + 1):
        y = panel.y(10.0**power)
        parts.append(line(panel.x(low), y, panel.x(high), y, GRID))
        parts.append(text(panel.x(low) - 6, y + 4, f"{10.0**power:g}", 10, "end"))
    for count in range(low, high + 1, step):
        parts.append(line(panel.x(count), panel.y(10.0**panel.power_low), panel.x(count), _TOP, GRID))
        parts.append(text(panel.x(count), _HEIGHT - _BOTTOM + 14, str(count), 10))
    parts.append(text(left + _LEFT + (_WIDTH - _LEFT) / 2, _HEIGHT - 8, "bytes of K and V, a token and head", 10))
    parts.append(text(left + 12, _TOP - 6, "KL", 10))
    for name, colour in colours.items():
        own = sorted((r for r in series if _family(r) == name), key=lambda row: row["bytes_per_token_head"])
        places = [(panel.x(row["bytes_per_token_head"]), panel.y(row["kl_mean"])) for row in own]
        thick = 2.5 if name == _OURS else 1.2
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f"<polyline points='{joined}' fill='none' stroke='{colour}' stroke-width='{thick}'/>")
        for row, (x, y) in zip(own, places, strict=True):
            said = f"{row['method']}: {row['bytes_per_token_head']:g} bytes, KL {row['kl_mean']:.5f}"
            parts.append(point(x, y, thick + 1.5, colour, said))
    return parts
