"""Speculative decoding over tiles: answers with drafts against answers without, acceptance, and speed beside fp16, fp8.

    python -m benchmarks.serving.speculate --engine vllm --model DIR --draft DIR --text FILE --work FOLDER --out FILE

Every engine is a process of its own, whose result is kept in the folder: a run that is cut off goes on where it was.
First greedy answers are compared in canonical mode; beside them stand the engine's own, in the model dtype, since
matrix products of another shape round differently whatever the cache is. No speed is measured if more answers differ
than are allowed. Speeds are of one stream, over contexts of text.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.serving.compare import cut_prompts, first_divergence, model_config, read_tokens
from benchmarks.serving.engines import BASELINE, ENGINES, add_arguments, started_with
from benchmarks.serving.jobs import run_job
from kvarn import results
from kvarn.presets import is_preset_name

_VERIFY_ROWS = 4


def main() -> None:
    """Compare answers, then measure, and write one row for each context."""
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    ids = read_tokens(args.model, args.text)
    gate = _gate(args, ids)
    rows = [{**gate, "tok_s": None, "tok_s_without": None}]
    results.write(args.out, rows, engine=args.engine)
    print(json.dumps(gate), flush=True)
    if gate["mismatches"] > args.mismatches:
        sys.exit(f"{gate['mismatches']} answers differ, more than {args.mismatches}: no speed is measured.")
    rows = [{**gate, **speeds} for speeds in _speeds(args, ids)]
    results.write(args.out, rows, engine=args.engine)
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
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--mismatches", type=int, default=0, help="answers that may differ")
    parser.add_argument("--contexts", type=int, nargs="*", default=[32768])
    parser.add_argument("--decode-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kernels", type=Path, help="result file of benchmarks.kernels, for verify4_over_1")
    parser.add_argument("--kernel-case", default="k4v2_g128/1x64k/gqa8")
    return parser.parse_args()


def _gate(args: argparse.Namespace, ids: list[int]) -> dict[str, Any]:
    """Return how many answers differ, and the keys that all rows share."""
    prompts = cut_prompts(ids, args.prompts, args.prompt_tokens)
    greedy = {"greedy": {"prompts": prompts, "new_tokens": args.new_tokens}}
    canonical = [_run(args, f"canonical-{on}", args.dtype, on, greedy, canonical=True) for on in (False, True)]
    exact = [_run(args, f"greedy-{BASELINE}-{on}", BASELINE, on, greedy) for on in (False, True)]
    mine = _run(args, f"greedy-{args.dtype}", args.dtype, True, greedy)
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
        "fp16_mismatches": _mismatches(*exact),
        "acceptance_length": mine["greedy_acceptance_length"],
        "canonical_acceptance_length": canonical[1]["greedy_acceptance_length"],
        "fp16_acceptance_length": exact[1]["greedy_acceptance_length"],
        "verify4_over_1": _verify_ratio(args),
    }


def _mismatches(without: dict[str, Any], with_drafts: dict[str, Any]) -> int:
    pairs = zip(without["greedy"], with_drafts["greedy"], strict=True)
    return sum(first_divergence(a, b) < len(a) for a, b in pairs)


def _speeds(args: argparse.Namespace, ids: list[int]) -> list[dict[str, Any]]:
    """Return tokens a second of one stream over each context, with and without drafts, of every cache dtype."""
    case = {"batch": 1, "new_tokens": args.decode_tokens, "repeats": args.repeats, "text": ids}
    case["vocab"] = model_config(args.model)["vocab_size"]
    job = {"decode": [{**case, "context": context} for context in args.contexts]}
    rows: list[dict[str, Any]] = [{"context": context} for context in args.contexts]
    peers = [ENGINES[args.engine].fp8] if args.peers is None else args.peers
    for dtype in (args.dtype, BASELINE, *peers):
        prefix = {args.dtype: "", BASELINE: "fp16_"}.get(dtype, f"{dtype}_")
        for on in (True, False):
            name = "-".join(map(str, ("speed", dtype, on, *args.contexts)))
            for row, found in zip(rows, _run(args, name, dtype, on, job)["decode"], strict=True):
                row[f"{prefix}tok_s" + ("" if on else "_without")] = round(found["decode_tok_s"], 2)
        for row in rows:
            row[f"{prefix}gain"] = round(row[f"{prefix}tok_s"] / row[f"{prefix}tok_s_without"], 3)
    return rows


def _run(
    args: argparse.Namespace, name: str, dtype: str, drafts: bool, job: dict[str, Any], *, canonical: bool = False
) -> dict[str, Any]:
    """Run an engine for a job, unless the folder has its result."""
    kept = args.work / f"{args.engine}-{args.method}-{args.drafts}-{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    others = {} if is_preset_name(dtype) else args.other_arguments
    arguments = started_with(args.engine, args.model, args.model_dtype, dtype, args.requests, args.arguments | others)
    if drafts:
        arguments |= ENGINES[args.engine].speculation(args.method, args.draft, args.drafts)
    os.environ["KVARN_CANONICAL"] = str(int(canonical))
    found = run_job(args.engine, {"engine": arguments, "drafts": drafts, **job}, args.work, name)
    kept.write_text(json.dumps(found))
    return found


def _verify_ratio(args: argparse.Namespace) -> float | None:
    """Return how many times as long four query rows take as one, as the kernel benchmark found it."""
    if args.kernels is None:
        return None
    name = f"{args.kernel_case}/q{_VERIFY_ROWS}"
    rows = json.loads(args.kernels.read_text())["rows"]
    return next((row["vs_q_len_1"] for row in rows if row["case"] == name), None)


if __name__ == "__main__":
    main()
