"""Tables of a document, made from the rows that `kvarn eval` measured."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from kvarn.errors import KVarNError
from kvarn.presets import is_preset_name

BEGIN = "<!-- kvarn plot: begin -->"
END = "<!-- kvarn plot: end -->"

_Row = dict[str, Any]
# A method that stores fp8 is another class of bytes: it is shown, but no preset is held against it.
_SHOWN_ONLY = ("fp8-e4m3",)
_HEADER = (
    "| Method | Bytes | KL | median | p99 | equal argmax | perplexity (exact) |",
    "|---|---|---|---|---|---|---|",
)


def _series(row: _Row) -> tuple[str, str, int]:
    return row["model"], row["text"], row["tokens"]


def losing_cases(rows: Iterable[_Row]) -> list[tuple[_Row, _Row]]:
    """Return every preset's row with each other method that has less KL at no more bytes, on the same text."""
    found = []
    for _, group in groupby(sorted(rows, key=_series), key=_series):
        series = list(group)
        presets = [row for row in series if is_preset_name(row["method"])]
        others = [row for row in series if row not in presets and row["method"] not in _SHOWN_ONLY]
        found += [
            (row, other)
            for row in presets
            for other in others
            if other["bytes_per_token_head"] <= row["bytes_per_token_head"] and other["kl_mean"] < row["kl_mean"]
        ]
    return found


def tables(rows: Iterable[_Row]) -> str:
    """Return the tables, one a model and text, and where presets lose, in Markdown."""
    rows = list(rows)
    lines = []
    for (model, text, tokens), group in groupby(sorted(rows, key=_series), key=_series):
        lines += [f"### {model}, {text}, {tokens} tokens", "", *_HEADER]
        lines += map(_line, sorted(group, key=lambda row: (row["bytes_per_token_head"], row["kl_mean"])))
        lines.append("")
    lines += ["### Where KVarN loses at the same bytes or fewer", ""]
    losing = losing_cases(rows)
    lines += [
        f"- {row['model']}, {row['text']}: `{row['method']}` ({row['kl_mean']:.4f}) to {other['method']} "
        f"({other['kl_mean']:.4f})"
        for row, other in losing
    ] or ["Nowhere among these."]
    return "\n".join(lines) + "\n"


def _line(row: _Row) -> str:
    name = f"**`{row['method']}`**" if is_preset_name(row["method"]) else row["method"]
    return (
        f"| {name} | {row['bytes_per_token_head']:g} | {row['kl_mean']:.5f} | {row['kl_median']:.5f} "
        f"| {row['kl_p99']:.4f} | {row['top1']:.1%} | {row['ppl']:.3f} ({row['ppl_exact']:.3f}) |"
    )


def insert(document: str, made: str) -> str:
    """Return a document with what stands between its marks replaced.

    Raises:
        KVarNError: the document has no marks.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise KVarNError(f"The document needs the lines {BEGIN} and {END}, between which tables are written.")
    return f"{before}{BEGIN}\n\n{made}\n{END}{after}"
