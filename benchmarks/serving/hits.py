"""First tokens of prompts whose beginning is cached: KVarN beside the model dtype, by cached and by new tokens.

    python -m benchmarks.serving.hits --engine sglang --model DIR --text FILE --out hits-sglang-h100.json

Prompts are cut from a text, one stream, one token each. The engines of all dtypes run beside each other and take turns,
a prompt each: hosts that others share change their speed within seconds, and small models wait for the host. So all
need room on one GPU. No time is reported if an engine found less in its cache than was left there, or if too many first
tokens differ from those of the model dtype.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.serving.compare import read_tokens
from benchmarks.serving.engines import BASELINE, add_arguments, add_dtype_arguments, started_with
from benchmarks.serving.jobs import EngineFailed, run_job
from benchmarks.serving.turns import Turns
from kvarn import results

_PAGE = 128
_WARM = 2


def main() -> None:
    """Measure every dtype in a process of its own and write one row for each case."""
    args = _arguments()
    cases = [(cached, new) for cached in args.cached for new in args.new]
    asked = cut(read_tokens(args.model, args.text), cases, args.repeats + _WARM)
    try:
        found = _measure(args, (BASELINE, *args.dtypes), asked)
    except EngineFailed as error:
        sys.exit(str(error))
    for dtype, measured in found.items():
        if faults := gate(cases, found[BASELINE], measured, args.least_equal):
            sys.exit(f"{dtype}: no time is reported. " + " ".join(faults))
    results.write(args.out, rows_of(args, cases, found), engine=args.engine)
    for row in results.read(args.out):
        print(json.dumps(row))


def _measure(
    args: argparse.Namespace, dtypes: tuple[str, ...], asked: list[dict[str, list[Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """Return what each dtype's engine found."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(dtypes)) as pool:
        turns = str(Path(folder) / "turn")

        def run(which: int) -> list[dict[str, Any]]:
            engine = started_with(
                args.engine, args.model, args.model_dtype, dtypes[which], args.requests, args.arguments,
                args.baseline_arguments,
            )  # fmt: skip
            mine = (turns, which, len(dtypes))
            try:
                job = {"engine": engine, "hits": asked, "turns": mine}
                answer: list[dict[str, Any]] = run_job(args.engine, job, Path(folder), dtypes[which])["hits"]
            except EngineFailed:
                Turns(*mine).stop()
                raise
            return answer

        return dict(zip(dtypes, pool.map(run, range(len(dtypes))), strict=True))


def cut(ids: list[int], cases: list[tuple[int, int]], prompts: int) -> list[dict[str, list[Any]]]:
    """Return for each case, cached and new tokens, a beginning and that many endings, which follow it in a text.

    Raises:
        SystemExit: the text is too short.
    """
    longest = max(cached + prompts * new for cached, new in cases)
    if len(ids) < longest:
        sys.exit(f"The text has {len(ids)} tokens; {longest} are needed.")
    return [
        {
            "prefix": ids[:cached],
            "endings": [ids[cached + i * new : cached + (i + 1) * new] for i in range(prompts)],
        }
        for cached, new in cases
    ]


def gate(
    cases: list[tuple[int, int]], baseline: list[dict[str, Any]], mine: list[dict[str, Any]], least_equal: float
) -> list[str]:
    """Return why times mean nothing: too little found in the cache, too many other answers. Empty if they do."""
    faults = [
        f"Of {cached} cached tokens only {min(case['cached'])} were found."
        for (cached, _), case in zip(cases, mine, strict=True)
        if min(case["cached"]) < cached - _PAGE
    ]
    pairs = [pair for a, b in zip(baseline, mine, strict=True) for pair in zip(a["tokens"], b["tokens"], strict=True)]
    equal = sum(a == b for a, b in pairs) / len(pairs)
    if equal < least_equal:
        faults.append(f"{equal:.0%} of the first tokens are those of the model dtype, fewer than {least_equal:.0%}.")
    return faults


def rows_of(
    args: argparse.Namespace, cases: list[tuple[int, int]], found: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return a row for every dtype and case; the first prompts of a case warm up.

    of_model_dtype is the median over the prompts of how many times as long one took.
    """
    rows = []
    for dtype, measured in found.items():
        for (cached, new), mine, baseline in zip(cases, measured, found[BASELINE], strict=True):
            times = sorted(mine["ms"][_WARM:])
            ratios = [ours / theirs for ours, theirs in zip(mine["ms"], baseline["ms"], strict=True)][_WARM:]
            rows.append(
                {
                    "engine": args.engine,
                    "model": Path(args.model).name,
                    "model_dtype": args.model_dtype,
                    "dtype": args.model_dtype if dtype == BASELINE else dtype,
                    "cached": cached,
                    "new_tokens": new,
                    "ttft_ms": round(statistics.median(times), 2),
                    "ttft_ms_low": round(times[0], 2),
                    "ttft_ms_high": round(times[-1], 2),
                    "of_model_dtype": round(statistics.median(ratios), 3),
                    "first_tokens": len(mine["tokens"]),
                    "first_tokens_equal": sum(a == b for a, b in zip(mine["tokens"], baseline["tokens"], strict=True)),
                }
            )
    return rows


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    add_dtype_arguments(parser)
    parser.add_argument("--text", type=Path, required=True, help="prose, a plain text file")
    parser.add_argument("--cached", type=int, nargs="+", default=[31744, 4096, 0], help="tokens cached before")
    parser.add_argument("--new", type=int, nargs="+", default=[512, 128, 40], help="new tokens")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--least-equal", type=float, default=0.8, help="share of first tokens that must not differ")
    return parser.parse_args()


if __name__ == "__main__":
    main()
