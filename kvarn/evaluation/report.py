"""Tables of a document, made from the rows that `kvarn eval` and `benchmarks.quality` measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from kvarn.errors import KVarNError
from kvarn.evaluation.names import is_variant_name
from kvarn.presets import is_preset_name

BEGIN = "<!-- kvarn plot: begin -->"
END = "<!-- kvarn plot: end -->"

Row = dict[str, Any]
# A method that stores fp8 is another class of bytes: it is shown, but no preset is held against it.
_SHOWN_ONLY = ("fp8-e4m3",)
_HEADER = (
    "| Method | Bytes | KL | median | p99 | by quarter of the text | equal argmax | perplexity (exact) |",
    "|---|---|---|---|---|---|---|---|",
)
_QUARTERS = 4
# Of variants, the preset that they differ from.
_ABLATED = "kvarn_k4v2_g128"


def series_of(row: Row) -> tuple[str, str, int, str]:
    """Return what rows share that may be compared: model, text, tokens, model dtype."""
    return row["model"], row["text"], row["tokens"], row["model_dtype"]


def by_series(rows: Iterable[Row]) -> list[tuple[tuple[str, str, int, str], list[Row]]]:
    """Return the rows that may be compared with each other, together."""
    return [(key, list(group)) for key, group in groupby(sorted(rows, key=series_of), key=series_of)]


def losing_cases(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Return every preset's row with each other method that has less KL at no more bytes, on the same text."""
    found = []
    for _, series in by_series(rows):
        presets = [row for row in series if is_preset_name(row["method"])]
        others = [row for row in series if _is_rival(row["method"])]
        found += [
            (row, other)
            for row in presets
            for other in others
            if other["bytes_per_token_head"] <= row["bytes_per_token_head"] and other["kl_mean"] < row["kl_mean"]
        ]
    return found


def _is_rival(method: str) -> bool:
    return not (is_preset_name(method) or is_variant_name(method) or method in _SHOWN_ONLY)


def tables(rows: Iterable[Row]) -> str:
    """Return all tables in Markdown: methods, one table a model and text; conversations; ablation; losses; tasks."""
    rows = list(rows)
    measured = [row for row in rows if "kl_mean" in row]
    parts = [
        *_methods([row for row in measured if not is_variant_name(row["method"])]),
        *_turns([row for row in measured if "kl_turn_2" in row and not is_variant_name(row["method"])]),
        *_ablation(measured),
        *_losses(measured),
        *_tasks([row for row in rows if "task" in row]),
    ]
    return "\n".join(parts)


def _methods(rows: list[Row]) -> list[str]:
    lines = []
    for (model, text, tokens, dtype), series in by_series(rows):
        lines += [f"### {model}, {text}, {tokens} tokens, {dtype}", "", *_HEADER]
        lines += map(_method, sorted(series, key=lambda row: (row["bytes_per_token_head"], row["kl_mean"])))
        lines.append("")
    return lines


def _method(row: Row) -> str:
    quarters = " / ".join(f"{row[f'kl_quarter_{i}']:.4f}" for i in range(1, _QUARTERS + 1))
    return (
        f"| {_name(row['method'])} | {row['bytes_per_token_head']:g} | {row['kl_mean']:.5f} | {row['kl_median']:.5f} "
        f"| {row['kl_p99']:.4f} | {quarters} | {row['top1']:.1%} | {row['ppl']:.3f} ({row['ppl_exact']:.3f}) |"
    )


def _name(method: str) -> str:
    return f"**`{method}`**" if is_preset_name(method) else method


def _turns(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    header = [
        "| Model | Conversation | Turns | Method | Bytes | KL by quarter of the turns |",
        "|---|---|---|---|---|---|",
    ]
    lines = ["### Conversations, turn by turn", "", *header]
    for (model, text, tokens, _), series in by_series(rows):
        for row in sorted(series, key=lambda row: (row["bytes_per_token_head"], row["kl_mean"])):
            turns = kl_by_turn(row)
            cuts = [len(turns) * i // _QUARTERS for i in range(_QUARTERS + 1)]
            means = " / ".join(f"{_mean(turns[a:b]):.4f}" for a, b in zip(cuts, cuts[1:], strict=False) if a < b)
            lines.append(
                f"| {model} | {text}, {tokens} tokens | {len(turns)} | {_name(row['method'])} "
                f"| {row['bytes_per_token_head']:g} | {means} |"
            )
    return [*lines, ""]


def kl_by_turn(row: Row) -> list[float]:
    """Return the mean KL of every turn of a conversation."""
    return [row[f"kl_turn_{i}"] for i in range(1, 1 + sum(name.startswith("kl_turn_") for name in row))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ablation(rows: list[Row]) -> list[str]:
    compared = []
    for (model, text, tokens, _), series in by_series(rows):
        ours = [row for row in series if row["method"] == _ABLATED]
        variants = [row for row in series if row["method"].startswith("k4v2:")]
        compared += [
            f"| {model}, {text}, {tokens} tokens | {row['method']} | {row['bytes_per_token_head']:g} "
            f"| {row['kl_mean']:.5f} | {row['kl_mean'] / preset['kl_mean']:.2f} |"
            for preset in ours
            for row in sorted(variants, key=lambda row: row["method"])
        ]
    if not compared:
        return []
    header = [f"| Model and text | Instead of `{_ABLATED}` | Bytes | KL | times its KL |", "|---|---|---|---|---|"]
    return ["### What each part is worth", "", *header, *compared, ""]


def _losses(rows: list[Row]) -> list[str]:
    lost = [
        f"- {row['model']}, {row['text']}, {row['tokens']} tokens: `{row['method']}` ({row['kl_mean']:.4f}) to "
        f"{other['method']} ({other['kl_mean']:.4f})"
        for row, other in losing_cases(rows)
    ]
    return ["### Where KVarN loses at the same bytes or fewer", "", *(lost or ["Nowhere among these."]), ""]


def _tasks(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = [
        "### Tasks, item by item",
        "",
        "| Task | Model | Engine | Cache | Right | Lost to the model's own dtype | Won from it | p (McNemar) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = sorted(rows, key=lambda row: (row["task"], row["model"], row["engine"], row["model_dtype"], row["dtype"]))
    for row in order:
        own = row["dtype"] == "auto"
        discordant = "| | | |" if own else f"| {_items(row['lost'])} | {_items(row['won'])} | {row['p_mcnemar']:g} |"
        dtype = row["model_dtype"] if own else f"`{row['dtype']}`"
        right = f"{row['right']} of {row['items']}"
        lines.append(f"| {row['task']} | {row['model']} | {row['engine']} | {dtype} | {right} {discordant}")
    return [*lines, ""]


def _items(names: Sequence[str]) -> str:
    shown = ", ".join(name.rpartition("/")[2] for name in names)
    return f"{len(names)}: {shown}" if names else "0"


def insert(document: str, made: str, begin: str = BEGIN, end: str = END) -> str:
    """Return a document with what stands between its marks replaced.

    Raises:
        KVarNError: the document has no marks.
    """
    before, first, rest = document.partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise KVarNError(f"The document needs the lines {begin} and {end}, between which tables are written.")
    return f"{before}{begin}\n\n{made}\n{end}{after}"
