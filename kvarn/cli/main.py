"""`kvarn COMMAND`: what can be asked beside an engine."""

from __future__ import annotations

import argparse
import sys

import kvarn
from kvarn.cli import bench, doctor, plan, plot, presets, selftest
from kvarn.cli import eval as evaluate
from kvarn.errors import KVarNError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status."""
    parser = argparse.ArgumentParser(prog="kvarn", description=kvarn.__doc__)
    parser.add_argument("--version", action="version", version=kvarn.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (doctor, presets, plan, selftest, evaluate, bench, plot):
        module.add_parser(commands)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except KVarNError as error:
        print(f"kvarn: {error}", file=sys.stderr)
        return 1
    return 0
