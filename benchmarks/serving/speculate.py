"""Speculative decoding over tiles: answers with drafts against answers without, acceptance, and speed beside fp16, fp8.

    python -m benchmarks.serving.speculate --engine vllm --model DIR --draft DIR --text FILE --work FOLDER --out FILE

Every engine is a process of its own, whose result is kept in the folder: a run that is cut off goes on where it was,
and several runs with one folder, each on a GPU of its own, share the engines.
First greedy answers are compared in canonical and batch-invariant mode, which the engine's matrix products follow on a
GPU, and nothing else is measured if more differ than are allowed.
Then, as served, every cache dtype answers the same prompts with and without drafts: answers differ in the model dtype,
too, since matrix products of another shape round differently. Speeds are of one stream, over contexts of text, a piece
of it each time: how many drafts are accepted is that piece's doing.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving.compare import cut_prompts, first_divergence, model_config, read_tokens
from benchmarks.serving.engines import BASELINE, ENGINES, add_arguments, started_with
from benchmarks.serving.jobs import run_job
from kvarn import results
from kvarn.presets import is_preset_name

_VERIFY_ROWS = 4
_POLL_S = 1.0


def main() -> None:
    """Compare answers, then measure, and write one row for each context."""
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    ids = read_tokens(args.model, args.text)
    prompts = cut_prompts(ids, args.prompts, args.prompt_tokens)
    greedy = {"greedy": {"prompts": prompts, "new_tokens": args.new_tokens}}
    canonical = _results(
        args, [_Asked(f"canonical-{on}", args.dtype, on, greedy, canonical=True) for on in (False, True)]
    )
    mismatches = _mismatches(*canonical)
    print(f"{mismatches} of {args.prompts} answers differ with drafts", flush=True)
    if mismatches > args.mismatches:
        sys.exit(f"{mismatches} answers differ, more than {args.mismatches}: no speed is measured.")
    served = {} if args.canonical_only else _serve(args, (args.dtype, BASELINE, *_peers(args)), ids, greedy)
    row = _answers(args, canonical, served)
    contexts = args.contexts if served else []
    rows = [{**row, "context": context, **_speeds(args, served, i)} for i, context in enumerate(contexts)]
    results.write(args.out, rows or [row], engine=args.engine)
    for row in rows:
        print(json.dumps(row))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--draft", help="checkpoint folder of the draft model; none for n-grams")
    parser.add_argument(
        "--method", default="draft_model", help="as vLLM names it: draft_model, eagle, eagle3, mtp, ngram"
    )
    parser.add_argument("--drafts", type=int, default=3, help="drafts of a step")
    parser.add_argument("--text", type=Path, required=True, help="text that prompts are cut from")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps the result of every engine")
    parser.add_argument("--dtype", default="kvarn_k4v2_g128")
    parser.add_argument("--peers", nargs="*", help="other cache dtypes whose speed is measured; 8-bit floats if unset")
    parser.add_argument(
        "--other-arguments", type=json.loads, default={}, help="more for cache dtypes that aren't KVarN's, JSON"
    )
    parser.add_argument("--peer-arguments", type=json.loads, default={}, help="more for the peers alone, JSON")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--mismatches", type=int, default=0, help="answers that may differ")
    parser.add_argument("--canonical-only", action="store_true", help="compare these answers and measure nothing else")
    parser.add_argument("--contexts", type=int, nargs="*", default=[32768])
    parser.add_argument("--decode-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="pieces of text that speeds are measured over")
    parser.add_argument(
        "--kernels", type=Path, help="result file of benchmarks.kernels, for verify4_over_1; none if missing"
    )
    parser.add_argument("--kernel-case", default="k4v2_g128/1x64k/gqa8")
    return parser.parse_args()


def _peers(args: argparse.Namespace) -> list[str]:
    return [ENGINES[args.engine].fp8] if args.peers is None else args.peers


def _serve(
    args: argparse.Namespace, dtypes: tuple[str, ...], ids: list[int], greedy: dict[str, Any]
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return what an engine without drafts and one with them answer and how fast they are, for each cache dtype."""
    case = {"batch": 1, "new_tokens": args.decode_tokens, "repeats": args.repeats, "text": ids}
    case["vocab"] = model_config(args.model)["vocab_size"]
    job = greedy | {"decode": [{**case, "context": context} for context in args.contexts]}
    contexts = "-".join(map(str, args.contexts))
    asked = [_Asked(f"served-{dtype}-{contexts}-{on}", dtype, on, job) for dtype in dtypes for on in (False, True)]
    found = iter(_results(args, asked))
    return {dtype: (next(found), next(found)) for dtype in dtypes}


def _answers(
    args: argparse.Namespace,
    canonical: list[dict[str, Any]],
    served: dict[str, tuple[dict[str, Any], dict[str, Any]]],
) -> dict[str, Any]:
    """Return what all rows share: the setting, how many answers differ, and how many tokens a step gave."""
    return {
        "engine": args.engine,
        "model": Path(args.model).name,
        "draft": Path(args.draft).name if args.draft else None,
        "method": args.method,
        "drafts": args.drafts,
        "dtype": args.dtype,
        "prompts": args.prompts,
        "new_tokens": args.new_tokens,
        "mismatches": _mismatches(*canonical),
        "canonical_acceptance_length": canonical[1]["greedy_acceptance_length"],
        "verify4_over_1": _verify_ratio(args),
        **{
            f"{_prefix(args, dtype)}{name}": value
            for dtype, found in served.items()
            for name, value in (
                ("acceptance_length", found[1]["greedy_acceptance_length"]),
                ("served_mismatches", _mismatches(*found)),
            )
        },
    }


def _prefix(args: argparse.Namespace, dtype: str) -> str:
    return {args.dtype: "", BASELINE: "fp16_"}.get(dtype, f"{dtype}_")


def _mismatches(without: dict[str, Any], with_drafts: dict[str, Any]) -> int:
    pairs = zip(without["greedy"], with_drafts["greedy"], strict=True)
    return sum(first_divergence(a, b) < len(a) for a, b in pairs)


def _speeds(
    args: argparse.Namespace, served: dict[str, tuple[dict[str, Any], dict[str, Any]]], which: int
) -> dict[str, float]:
    """Return how fast one stream over one of the contexts is, with and without drafts, for every cache dtype.

    Tokens a second, and, with drafts, what a step gave of that text and how long it took.
    """
    found = {}
    for dtype, both in served.items():
        without, drafting = (answer["decode"][which] for answer in both)
        prefix = _prefix(args, dtype)
        for name, speed in (("tok_s", drafting), ("tok_s_without", without)):
            for spread in ("", "_low", "_high"):
                found[f"{prefix}{name}{spread}"] = round(speed[f"decode_tok_s{spread}"], 2)
        found[f"{prefix}gain"] = round(found[f"{prefix}tok_s"] / found[f"{prefix}tok_s_without"], 3)
        if accepted := drafting.get("acceptance_length"):
            found[f"{prefix}tokens_a_step"] = round(accepted, 3)
            found[f"{prefix}step_ms"] = round(1e3 * accepted / drafting["decode_tok_s"], 3)
    return found


@dataclass(frozen=True, slots=True)
class _Asked:
    """An engine and its job; canonical: answers are to be the same with and without drafts."""

    name: str
    dtype: str
    drafts: bool
    job: dict[str, Any]
    canonical: bool = False


def _results(args: argparse.Namespace, asked: list[_Asked]) -> list[dict[str, Any]]:
    """Return the engines' results. Those that another run is at work on come last."""
    found: dict[str, dict[str, Any]] = {}
    while len(found) < len(asked):
        for one in asked:
            if one.name not in found and (result := _run(args, one)) is not None:
                found[one.name] = result
        if len(found) < len(asked):
            time.sleep(_POLL_S)
    return [found[one.name] for one in asked]


def _run(args: argparse.Namespace, asked: _Asked) -> dict[str, Any] | None:
    """Run an engine for its job, unless the folder has its result; None if another run is at work on it."""
    kept = args.work / f"{args.engine}-{args.method}-{args.drafts}-{asked.name}.json"
    with kept.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if not kept.exists():
            kept.write_text(json.dumps(_measured(args, asked)))
        result: dict[str, Any] = json.loads(kept.read_text())
        return result


def _measured(args: argparse.Namespace, asked: _Asked) -> dict[str, Any]:
    others = {} if is_preset_name(asked.dtype) else args.other_arguments
    if asked.dtype not in (args.dtype, BASELINE):
        others = others | args.peer_arguments
    arguments = started_with(
        args.engine, args.model, args.model_dtype, asked.dtype, args.requests, args.arguments | others
    )
    if asked.drafts:
        arguments |= ENGINES[args.engine].speculation(args.method, args.draft, args.drafts)
    environment = {}
    if asked.canonical:
        environment = {"KVARN_CANONICAL": "1", "KVARN_BATCH_INVARIANT": "1"}
        if torch.cuda.is_available():
            more, variables = ENGINES[args.engine].invariance()
            arguments, environment = arguments | more, environment | variables
    job = {"engine": arguments, "drafts": asked.drafts, **asked.job}
    return run_job(args.engine, job, args.work, asked.name, environment)


def _verify_ratio(args: argparse.Namespace) -> float | None:
    """Return how many times as long four query rows take as one, as the kernel benchmark found it."""
    if args.kernels is None:
        return None
    name = f"{args.kernel_case}/q{_VERIFY_ROWS}"
    return next((row["vs_q_len_1"] for row in results.read(args.kernels) if row["case"] == name), None)


if __name__ == "__main__":
    main()
