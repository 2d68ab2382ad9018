"""`kvarn bench serve`: capacity, throughput and latency of cache dtypes in an engine, by the engine's own client."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kvarn import env, results
from kvarn.errors import KVarNError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from kvarn.bench.runner import Bench

_START_TIMEOUT_S = 900
_CLIENT_TIMEOUT_S = 3600


def add_parser(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    bench = commands.add_parser("bench", help="measure served engines")
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="KIND")
    parser = kinds.add_parser(
        "serve",
        help="start a server for each cache dtype, drive it with the engine's own client, write what is measured",
        epilog="Arguments for the engine's server, the same for every cache dtype, come last, after --.",
    )
    parser.add_argument("--engine", required=True, choices=("sglang", "vllm"))
    parser.add_argument("--model", help="checkpoint folder or name on a hub")
    parser.add_argument("--shape", help="instead of a model: one of docs/benchmarks.md, with random weights")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="with --shape: folder whose tokenizer it gets")
    parser.add_argument("--dtypes", required=True, help="cache dtypes, with commas; auto, the baseline, comes first")
    parser.add_argument("--workload", required=True, help="names with commas (docs/benchmarks.md); slope, all")
    parser.add_argument("--out", type=Path, required=True, help="result file; what stands in it isn't measured again")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the size of workloads, to try things")
    parser.add_argument("--port", type=int, help="of the server (default: any free one)")
    parser.add_argument("--timeout", type=float, default=_START_TIMEOUT_S, help="seconds until a server is healthy")
    parser.add_argument("--client-timeout", type=float, default=_CLIENT_TIMEOUT_S, help="seconds for a client's run")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="for logs (default: a folder for temporary files)")
    parser.add_argument("arguments", nargs="*", metavar="-- ENGINE ARGUMENT", help="for the engine's server")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure what is missing in the result file, and print its table.

    Raises:
        KVarNError: arguments make no sense, or a cache dtype could not be measured.
    """
    from kvarn.bench.report import table
    from kvarn.bench.server import exit_on_signals
    from kvarn.bench.workloads import named

    if args.scale <= 0:
        raise KVarNError(f"--scale {args.scale:g} is not above 0.")
    if bool(args.model) == bool(args.shape):
        raise KVarNError("Name either a model by --model or a shape without weights by --shape.")
    workloads = named(args.workload)
    exit_on_signals()
    with tempfile.TemporaryDirectory(prefix="kvarn-shape-") as folder:
        model = args.model or _shape(args, Path(folder))
        rows = _bench(args, model).run(args.dtypes.split(","), workloads)
    print(table(rows))


def _shape(args: argparse.Namespace, folder: Path) -> str:
    from kvarn.bench.shapes import SHAPES, write_checkpoint

    if args.shape not in SHAPES:
        raise KVarNError(f"There is no shape {args.shape!r}; choose from {', '.join(SHAPES)}.")
    if args.tokenizer is None:
        raise KVarNError("A shape has no tokenizer; name a folder that has one with --tokenizer.")
    return str(write_checkpoint(args.shape, args.tokenizer, folder))


def _bench(args: argparse.Namespace, model: str) -> Bench:
    import torch

    from kvarn.bench.engines import ENGINES
    from kvarn.bench.rows import Setting
    from kvarn.bench.runner import Bench
    from kvarn.bench.shapes import DUMMY_FLAGS
    from kvarn.checkpoint import read_config

    cuda = torch.cuda.is_available()
    dummy = bool(args.shape) or "dummy" in args.arguments
    setting = Setting(
        engine=args.engine,
        model=args.shape or Path(args.model).name,
        weights="dummy" if dummy else "real",
        gpu=torch.cuda.get_device_name() if cuda else "none",
        scale=args.scale,
        arguments=shlex.join([*env.modes(), *map(results.without_folder, args.arguments)]),
    )
    return Bench(
        engine=ENGINES[args.engine],
        model=model,
        config=read_config(model),
        setting=setting,
        arguments=(*(DUMMY_FLAGS if args.shape else ()), *args.arguments),
        cuda=cuda,
        out=args.out,
        logs=args.logs or Path(tempfile.mkdtemp(prefix="kvarn-bench-")),
        port=args.port,
        start_timeout_s=args.timeout,
        client_timeout_s=args.client_timeout,
        say=lambda line: print(line, flush=True),
    )
