"""Tensor parallelism: answers of several ranks beside those of one, and whether the ranks decide the same.

    python -m benchmarks.serving.parallel --engine vllm --model DIR --text FILE --work FOLDER --out FILE

Sums over ranks round differently whatever the cache is, so the answers with tiles are judged by the engine's own in
the model dtype: agreement is the mean share of an answer before its first other token. How far one GPU agrees with
itself, asked twice, stands beside it. Then traffic that seals and finds many tiles runs over tiles, while every rank
hashes what decides what it seals and reads (`trail`).

Every engine is a process of its own, whose result is kept in the folder: a run that is cut off goes on where it was.
Ends with an error if agreement is lower by more than the tolerance, or if the ranks differ.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.serving import trail
from benchmarks.serving.compare import cut_prompts, first_divergence, read_tokens
from benchmarks.serving.engines import BASELINE, ENGINES, add_arguments, started_with
from benchmarks.serving.jobs import run_job
from kvarn import results

# Two standard errors of the difference between two means over 64 answers, of which some agree in full and some hardly.
_TOLERANCE = 0.15
# Requests of a wave of traffic, in requests that run at once.
_WAVE = 4
# What tells a row from others of its file.
_CASE = ("engine", "model", "model_dtype", "tp", "dtype")


def main() -> None:
    """Ask one and several ranks with each cache, drive the traffic, write the row, judge it."""
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    ids = read_tokens(args.model, args.text)
    found = {
        (dtype, ranks): _run(args, dtype, ranks, ids) for dtype in (args.dtype, BASELINE) for ranks in (args.tp, 1)
    }
    row = row_of(args, found)
    others = [other for other in results.read(args.out) if any(other[key] != row[key] for key in _CASE)]
    results.write(args.out, [*others, row], engine=args.engine)
    print(json.dumps(row))
    if reasons := faults(row, args.steps, args.tolerance):
        sys.exit("\n".join(reasons))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--text", type=Path, required=True, help="text that prompts are cut from")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps the result of every engine")
    parser.add_argument("--tp", type=int, default=2, help="ranks")
    parser.add_argument("--dtype", default="kvarn_k4v2_g128")
    parser.add_argument(
        "--baseline-arguments", type=json.loads, default={}, help="more for the model's own dtype, JSON"
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--tolerance", type=float, default=_TOLERANCE, help="by how much agreement may be lower")
    parser.add_argument("--steps", type=int, default=10000, help="steps whose decisions are compared")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the traffic's longest prompt")
    parser.add_argument("--answers", type=int, default=256, help="tokens of its longest answer")
    return parser.parse_args()


def _run(args: argparse.Namespace, dtype: str, ranks: int, ids: list[int]) -> dict[str, Any]:
    """Run an engine, unless the folder has its result."""
    name = f"{args.engine}-{dtype}-tp{ranks}"
    kept = args.work / f"{name}.kept.json"
    if kept.exists():
        return json.loads(kept.read_text())
    prompts = cut_prompts(ids, args.prompts, args.prompt_tokens)
    arguments = started_with(
        args.engine, args.model, args.model_dtype, dtype, args.requests, args.arguments, args.baseline_arguments
    )
    job: dict[str, Any] = {
        "engine": arguments | ENGINES[args.engine].parallel(ranks),
        "greedy": {"prompts": prompts, "new_tokens": args.new_tokens, "again": ranks == 1},
    }
    os.environ.pop(trail.FOLDER, None)
    if ranks > 1 and dtype != BASELINE:
        folder = args.work / f"{name}.trail"
        folder.mkdir(exist_ok=True)
        for left in folder.iterdir():  # of a run that was cut off
            left.unlink()
        os.environ[trail.FOLDER] = str(folder.absolute())
        job["traffic"] = {
            "folder": str(folder.absolute()),
            "ranks": ranks,
            "steps": args.steps,
            "text": ids,
            "requests": _WAVE * args.requests,
            "longest": args.longest,
            "new_tokens": args.answers,
        }
    found = run_job(args.engine, job, args.work, name)
    kept.write_text(json.dumps(found))
    return found


def row_of(args: argparse.Namespace, found: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Return the row of what engines answered, by cache dtype and ranks."""
    mine, exact = found[args.dtype, args.tp], found[BASELINE, args.tp]
    reports = [trail.Report(**report) for report in mine["traffic"]]
    differs = trail.first_difference(reports)
    return {
        "engine": args.engine,
        "model": Path(args.model).name,
        "model_dtype": args.model_dtype,
        "tp": args.tp,
        "dtype": args.dtype,
        "prompts": args.prompts,
        "new_tokens": args.new_tokens,
        **_agreement("", found[args.dtype, 1], mine),
        **_agreement("fp16_", found[BASELINE, 1], exact),
        "steps": min(report.steps for report in reports),
        "hash_equal": differs is None,
        "hash_differs_after_steps": None if differs is None else differs * trail.PERIOD,
        "sealed_tiles": reports[0].sealed,
        "prefix_hits": reports[0].hits,
        "kv_tokens": mine["kv_tokens"],
        "fp16_kv_tokens": exact["kv_tokens"],
        "capacity_ratio": round(mine["kv_tokens"] / exact["kv_tokens"], 3),
    }


def _agreement(prefix: str, alone: dict[str, Any], together: dict[str, Any]) -> dict[str, Any]:
    """Return how far answers of several ranks agree with those of one, and how far one agrees with itself."""
    first = alone["greedy"]
    same, again = (
        [first_divergence(a, b) for a, b in zip(first, other, strict=True)]
        for other in (together["greedy"], alone["greedy_again"])
    )
    length = len(first[0])
    return {
        f"{prefix}equal": same.count(length),
        f"{prefix}first_divergence_median": statistics.median(same),
        f"{prefix}agreement": round(statistics.mean(same) / length, 4),
        f"{prefix}equal_again": again.count(length),
        f"{prefix}agreement_again": round(statistics.mean(again) / length, 4),
    }


def faults(row: dict[str, Any], steps: int, tolerance: float) -> list[str]:
    """Return every reason why a row is not good enough, one sentence each."""
    found = []
    if row["agreement"] < row["fp16_agreement"] - tolerance:
        found.append(
            f"{row['tp']} ranks agree with one by {row['agreement']}, by {row['fp16_agreement']} in the model dtype: "
            f"lower by more than {tolerance}."
        )
    if not row["hash_equal"]:
        found.append(
            f"The ranks decided differently within {trail.PERIOD} steps after {row['hash_differs_after_steps']}."
        )
    if row["steps"] < steps:
        found.append(f"Only {row['steps']} of {steps} steps were hashed.")
    if not row["sealed_tiles"] or not row["prefix_hits"]:
        found.append(f"{row['sealed_tiles']} tiles were sealed and {row['prefix_hits']} requests found some: too few.")
    return found


if __name__ == "__main__":
    main()
