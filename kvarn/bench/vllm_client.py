"""`vllm bench serve`, as a module: its own command looks for a distribution that CPU builds name otherwise."""

from __future__ import annotations

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser


def parser() -> FlexibleArgumentParser:
    """Return the client's own parser."""
    made = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(made)
    return made


if __name__ == "__main__":
    main(parser().parse_args())
