"""`kvarn eval MODEL`: what presets and other quantisers change about a model's predictions. Needs `kvarn[eval]`."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarn import results

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_KEY = ("model", "method", "text", "tokens", "model_dtype")


def add_parser(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("eval", help="compare predictions with and without a quantised cache")
    parser.add_argument("model", help="checkpoint folder or name on a hub")
    parser.add_argument(
        "methods", nargs="*", default=["kvarn_k4v2_g128"], help="presets, other methods, variants; all; ablation"
    )
    parser.add_argument("--text", required=True, help="a text file, code, humaneval or agent-8192 (docs/quality.md)")
    parser.add_argument("--out", type=Path, required=True, help="result file; what stands in it isn't measured again")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", default=None, help="of the model; default: float16 on a GPU, float32 elsewhere")
    parser.add_argument("--device", default=None, help="default: the GPU if there is one")
    parser.add_argument("--generate", type=int, default=0, metavar="TOKENS", help="also compare so many greedy tokens")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of --generate, cut from the text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure what is missing in the result file, row by row.

    Raises:
        KVarNError: there is no such text, or it is too short, or a method is unknown.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvarn.evaluation import texts
    from kvarn.evaluation.methods import methods
    from kvarn.evaluation.run import Evaluation, check_name, first_divergences
    from kvarn.evaluation.variants import ABLATION
    from kvarn.presets import PRESETS, is_preset_name

    groups = {"all": [*PRESETS, *methods()], "ablation": ABLATION}
    names = [name for asked in args.methods for name in groups.get(asked, [asked])]
    for name in names:
        check_name(name)
    text = texts.load(args.text, AutoTokenizer.from_pretrained(args.model), args.tokens)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("float16" if device.startswith("cuda") else "float32")
    common = {"model": Path(args.model).name, "text": text.name, "tokens": args.tokens, "model_dtype": dtype}
    rows = results.read(args.out)
    done = {_key(row) for row in rows}
    missing = [name for name in names if _key({**common, "method": name}) not in done]
    if not missing:
        print(f"Nothing is missing in {args.out}.")
        return
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype)).to(device).eval()
    evaluation = Evaluation(model, text.ids, _bar, text.turns)
    for name in missing:
        row = {**common, **evaluation.row(name)}
        if args.generate and is_preset_name(name):
            size = args.tokens // args.prompts
            prompts = [text.ids[i * size : (i + 1) * size] for i in range(args.prompts)]
            equal = first_divergences(model, name, prompts, args.generate)
            row |= {"greedy_new_tokens": args.generate, "first_divergence_median": statistics.median(equal)}
        rows.append(row)
        results.write(args.out, rows)
        print(f"{name}: KL {row['kl_mean']:.5f}, top-1 {row['top1']:.4f}, perplexity {row['ppl']:.3f} "
              f"(exact {row['ppl_exact']:.3f}), {row['bytes_per_token_head']:g} bytes")  # fmt: skip


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


def _bar(parts: Sequence[Any], label: str) -> Iterable[Any]:
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(parts, desc=label, unit="chunk", leave=False)
    return bar
