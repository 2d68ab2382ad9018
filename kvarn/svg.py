"""Parts of pictures as SVG, written by hand: the same rows give the same bytes everywhere, and nothing is installed."""

from __future__ import annotations

from collections.abc import Sequence

# Colours that people with any colour vision tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
GRID = "#dddddd"
_INK = "#333333"
_FONT = "font-family='sans-serif' font-size="


def document(width: float, height: float, parts: Sequence[str]) -> str:
    """Return an SVG file with parts on white."""
    head = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}'>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def legend(names: Sequence[str], colours: Sequence[str], width: float, y: float) -> list[str]:
    """Return a coloured dot with each name, side by side."""
    parts = []
    for index, (name, colour) in enumerate(zip(names, colours, strict=True)):
        x = 16 + index * (width - 16) / len(names)
        parts.append(f"<circle cx='{x:.1f}' cy='{y}' r='4' fill='{colour}'/>")
        parts.append(text(x + 8, y + 4, name, 11, "start"))
    return parts


def line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """Return a straight line."""
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{colour}'/>"


def point(x: float, y: float, radius: float, colour: str, said: str) -> str:
    """Return a disc that says something when it is pointed at."""
    circle = f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius}' fill='{colour}'>"
    return f"{circle}<title>{said}</title></circle>"


def text(x: float, y: float, said: str, size: int, anchor: str = "middle") -> str:
    """Return a line of text."""
    return f"<text x='{x:.1f}' y='{y:.1f}' {_FONT}'{size}' fill='{_INK}' text-anchor='{anchor}'>{said}</text>"
