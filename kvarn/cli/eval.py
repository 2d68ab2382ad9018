"""`kvarn eval MODEL`: what presets and other quantisers change about a model's predictions. Needs `kvarn[eval]`."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarn import results
from kvarn.errors import KVarNError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_KEY = ("model", "method", "text", "tokens", "model_dtype")


def add_parser(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("eval", help="compare predictions with and without a quantised cache")
    parser.add_argument("model", help="checkpoint folder or name on a hub")
    parser.add_argument("methods", nargs="*", default=["kvarn_k4v2_g128"], help="presets, other methods, or all")
    parser.add_argument("--text", type=Path, required=True, help="plain text file")
    parser.add_argument("--out", type=Path, required=True, help="result file; what stands in it isn't measured again")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--device", default=None, help="default: the GPU if there is one")
    parser.add_argument("--generate", type=int, default=0, metavar="TOKENS", help="also compare so many greedy tokens")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of --generate, cut from the text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure what is missing in the result file, row by row.

    Raises:
        KVarNError: the text is too short, or a method is unknown.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvarn.evaluation.methods import methods
    from kvarn.evaluation.run import Evaluation, check_name, first_divergences
    from kvarn.presets import PRESETS, is_preset_name

    names = [*PRESETS, *methods()] if args.methods == ["all"] else args.methods
    for name in names:
        check_name(name)
    ids = AutoTokenizer.from_pretrained(args.model)(args.text.read_text(), return_tensors="pt")["input_ids"][0]
    if len(ids) < args.tokens:
        raise KVarNError(f"{args.text} has {len(ids)} tokens, not {args.tokens}; ask for fewer with --tokens.")
    common = {"model": Path(args.model).name, "text": args.text.name, "tokens": args.tokens, "model_dtype": args.dtype}
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    done = {_key(row) for row in rows}
    missing = [name for name in names if _key({**common, "method": name}) not in done]
    if not missing:
        print(f"Nothing is missing in {args.out}.")
        return
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(device).eval()
    evaluation = Evaluation(model, ids[: args.tokens], _bar)
    for name in missing:
        row = {**common, **evaluation.row(name)}
        if args.generate and is_preset_name(name):
            size = args.tokens // args.prompts
            prompts = [ids[i * size : (i + 1) * size] for i in range(args.prompts)]
            equal = first_divergences(model, name, prompts, args.generate)
            row |= {"greedy_new_tokens": args.generate, "first_divergence_median": statistics.median(equal)}
        rows.append(row)
        results.write(args.out, rows)
        print(f"{name}: KL {row['kl_mean']:.5f}, top-1 {row['top1']:.4f}, perplexity {row['ppl']:.3f} "
              f"(exact {row['ppl_exact']:.3f}), {row['bytes_per_token_head']:g} bytes")  # fmt: skip


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


def _bar(parts: Iterable[Any], label: str) -> Iterable[Any]:
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(parts, desc=label, unit="chunk", leave=False)
    return bar
