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
    parser.add_argument("results", type=Path, nargs="+", help="result files; one that is missing has no rows")
    parser.add_argument("document", type=Path, help="Markdown file with marks between which the tables go")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Rewrite the document, and the picture beside it, which has its name and ends in .svg.

    The marks in the document decide which tables and picture it gets: those of quality or those of serving.

    Raises:
        KVarNError: the document has no marks.
    """
    from kvarn.bench import picture as serving_picture
    from kvarn.bench import report as serving
    from kvarn.evaluation import picture as quality_picture
    from kvarn.evaluation import report as quality

    rows = [row for path in args.results for row in results.read(path)]
    before = args.document.read_text()
    drawn = args.document.with_suffix(".svg")
    if serving.BEGIN in before:
        args.document.write_text(quality.insert(before, serving.tables(rows), serving.BEGIN, serving.END))
        drawn.write_text(serving_picture.picture(rows))
    else:
        args.document.write_text(quality.insert(before, quality.tables(rows)))
        drawn.write_text(quality_picture.picture(rows))
    print(f"{args.document}, {drawn}: {len(rows)} rows")
