"""`kvarn plot RESULTS... DOCUMENT`: write the tables and the picture of a document from measured rows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kvarn import results

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("plot", help="write a document's tables and picture from what was measured")
    parser.add_argument("results", type=Path, nargs="+", help="result files of kvarn eval and benchmarks.quality")
    parser.add_argument("document", type=Path, help="Markdown file with marks between which the tables go")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Rewrite the document, and the picture beside it, which has its name and ends in .svg.

    Raises:
        KVarNError: the document has no marks.
    """
    from kvarn.evaluation.picture import picture
    from kvarn.evaluation.report import insert, tables

    rows = [row for path in args.results for row in results.read(path)]
    args.document.write_text(insert(args.document.read_text(), tables(rows)))
    drawn = args.document.with_suffix(".svg")
    drawn.write_text(picture(rows))
    print(f"{args.document}, {drawn}: {len(rows)} rows")
