"""`kvarn plot RESULTS DOCUMENT`: write the tables of a document from measured rows."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("plot", help="write a document's tables from the rows that eval measured")
    parser.add_argument("results", type=Path, help="result file of kvarn eval")
    parser.add_argument("document", type=Path, help="Markdown file with marks between which the tables go")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Rewrite the document."""
    from kvarn.evaluation.report import insert, tables

    rows = json.loads(args.results.read_text())["rows"]
    args.document.write_text(insert(args.document.read_text(), tables(rows)))
    print(f"{args.document}: tables of {len(rows)} rows")
