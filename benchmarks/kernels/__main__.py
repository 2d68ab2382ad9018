"""Kernel benchmarks on one GPU: correctness first, then time, against the read bandwidth and against peers.

    python -m benchmarks.kernels decode                  about four minutes, writes benchmarks/results/decode-h100.json
    python -m benchmarks.kernels decode --only gqa16     cases whose name matches; --quick for one of each kind
    python -m benchmarks.kernels extend                  chunks over cached context; writes extend-h100.json
    python -m benchmarks.kernels mla                     decode over latents; writes mla-h100.json
    python -m benchmarks.kernels write                   append and seal; writes write-h100.json
    python -m benchmarks.kernels tune --only 64x16k/gqa8$   KVarN alone under many launch shapes
    python -m benchmarks.kernels once NAME ...           two layers of each case, for a profiler to look at
    python -m benchmarks.kernels list                    names of all cases, with peers and whether they can run

The exit status is 1 if an output was wrong or a case could not run; bars that are lost are told, and don't change it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.kernels import bandwidth, cases, decode, extend, measure, mla, timing, tune, warm, write
from benchmarks.kernels.inputs import make_inputs
from benchmarks.kernels.peers import registry
from benchmarks.kernels.workload import TABLE_TOKENS, build

_OUT = Path(__file__).resolve().parents[1] / "results" / "decode-h100.json"
_SIMPLE = {"extend": extend.run, "mla": mla.run, "write": write.run}


def main() -> None:
    """Parse arguments and run the command."""
    args = _arguments()
    if args.command == "list":
        _list()
    elif not torch.cuda.is_available():
        sys.exit("Timing needs a CUDA device; there is none. Tests run the same code on the CPU.")
    elif args.command == "warm":
        _warm(args)
    elif args.command == "tune":
        _tune(args)
    elif args.command == "once":
        _once(args)
    elif args.command in _SIMPLE:
        sys.exit(0 if _SIMPLE[args.command](_bench((), 0), args.out) else 1)
    else:
        sys.exit(0 if _decode(args) else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("decode", help="measure decode attention")
    run.add_argument("--only", metavar="PATTERN", help="regular expression, searched in the names of cases")
    run.add_argument("--quick", action="store_true", help="one case of each kind")
    run.add_argument("--out", type=Path, default=_OUT, help="result file")
    run.add_argument("--peers", nargs="*", help="peers to compare with (default: all that can run; no name: none)")
    run.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so many seconds")
    run.add_argument("--no-warm", action="store_true", help="compile kernels as they are measured, not ahead")
    names = commands.add_parser("warm", help="compile the kernels of some cases; `decode` calls it")
    names.add_argument("names", nargs="+")
    names.add_argument("--peers", nargs=1, help="compile this peer's kernels instead of KVarN's")
    names.add_argument(
        "--shape", nargs=5, type=int, help="warps, stages, programs, registers and room, as tune has them"
    )
    tuned = commands.add_parser("tune", help="measure the attention kernel under many launch shapes")
    tuned.add_argument(
        "--only", metavar="PATTERN", default="", help="regular expression, searched in the names of cases"
    )
    tuned.add_argument("--warps", nargs="+", type=int, default=[1, 2, 4, 8])
    tuned.add_argument("--stages", nargs="+", type=int, default=[2, 3, 5])
    tuned.add_argument("--programs", nargs="+", type=int, default=[4, 8, 16], help="a multiprocessor")
    tuned.add_argument(
        "--registers", nargs="+", type=int, default=[0, 168], help="the most of a thread, 0 for no limit"
    )
    tuned.add_argument("--rooms", nargs="+", type=int, default=[0], help="KiB of shared memory a program, at least")
    tuned.add_argument("--out", type=Path, default=_OUT.with_name("tune.json"), help="result file")
    tuned.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many seconds")
    shown = commands.add_parser("once", help="run two layers of some cases, for a profiler")
    shown.add_argument("names", nargs="+")
    for command in (run, names, tuned):
        command.add_argument("--table-tokens", type=int, default=TABLE_TOKENS, help="width of page tables, in tokens")
    for name in _SIMPLE:
        simple = commands.add_parser(name, help=f"measure the {name} path")
        simple.add_argument("--out", type=Path, default=_OUT.with_name(f"{name}-h100.json"), help="result file")
    commands.add_parser("list", help="print the names of cases and peers")
    return parser.parse_args()


def _decode(args: argparse.Namespace) -> bool:
    began = time.monotonic()
    chosen = cases.select(cases.registry(), args.only, args.quick)
    if not chosen:
        sys.exit(f"No case matches {args.only!r}; `python -m benchmarks.kernels list` prints their names.")
    peers = registry.select(args.peers)
    if not args.no_warm:
        for problem in warm.compile_all(chosen, peers, args.table_tokens):
            print(f"compiling ahead failed, {problem}", file=sys.stderr)
        print(f"compiled ahead in {time.monotonic() - began:.0f} s", file=sys.stderr)
    passed = decode.run(chosen, _bench(peers, args.table_tokens), args.out, began + args.seconds)
    print(f"{time.monotonic() - began:.0f} s in all; {args.out}", file=sys.stderr)
    return passed


def _bench(peers: Sequence[registry.Peer], table_tokens: int) -> measure.Bench:
    device = torch.device("cuda")
    limit = bandwidth.read_limit_tbps(timing.graph_timer, device)
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return measure.Bench(device, timing.graph_timer, l2_bytes, limit, peers, table_tokens)


def _tune(args: argparse.Namespace) -> None:
    began = time.monotonic()
    chosen = cases.select(cases.registry(), args.only)
    tried = tune.shapes(args.warps, args.stages, args.programs, args.registers, args.rooms)
    tune.compile_all(chosen, tried)
    print(f"compiled ahead in {time.monotonic() - began:.0f} s", file=sys.stderr)
    tune.run(chosen, tried, _bench((), args.table_tokens), args.out, began + args.seconds)


def _warm(args: argparse.Namespace) -> None:
    chosen = [case for case in cases.registry() if case.name in args.names]
    device = torch.device("cuda")
    if args.peers:
        warm.compile_peers(chosen, device, registry.select(args.peers))
    else:
        shape = tune.shapes(*([number] for number in args.shape))[0] if args.shape else None
        with tune.launched_as(shape) if shape else contextlib.nullcontext():
            warm.compile_own(chosen, device, args.table_tokens)
    torch.cuda.synchronize()


def _once(args: argparse.Namespace) -> None:
    device = torch.device("cuda")
    known = {case.name: case for case in cases.registry()}
    unknown = [name for name in args.names if name not in known]
    if unknown:
        sys.exit(f"No case is named {unknown[0]}; `python -m benchmarks.kernels list` prints their names.")
    for case in (known[name] for name in args.names):
        made = build(make_inputs(case, device), torch.cuda.get_device_properties(device).L2_cache_size)
        for copy in range(2):
            made.run(copy % len(made.layers))
        torch.cuda.synchronize()


def _list() -> None:
    for case in cases.registry():
        print(case.name)
    for peer in registry.PEERS:
        print(f"peer {peer.name} ({peer.kind}): {peer.installed or 'missing: ' + ' or '.join(peer.packages)}")


if __name__ == "__main__":
    main()
