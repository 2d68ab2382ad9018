"""Whether presets chosen layer by layer are better than one for all, at the same bytes.

    python -m benchmarks.quality.layers --model DIR --text prose.txt --out benchmarks/results/layers.json

How much a layer minds is measured twice: on random tokens, which needs no data, and on the beginning of the text
itself, which is the most that a measurement can know. Both choices are then compared with the uniform one on the text.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvarn import results
from kvarn.checkpoint import describe
from kvarn.evaluation import texts
from kvarn.evaluation.layers import cheapest, sensitivity
from kvarn.evaluation.method_cache import MethodCache
from kvarn.evaluation.run import Evaluation
from kvarn.evaluation.variants import variant

_UNIFORM = "k4v2:"
_CHOICES = ("k2v2:", "k4v2:", "k4v3:", "k4v4:")
_RANDOM, _ITSELF = "random tokens", "the text"
_SEED = 0


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, choose, compare, write the rows."""
    args = _arguments().parse_args(arguments)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    text = texts.load(str(args.text), AutoTokenizer.from_pretrained(args.model), args.tokens)
    draw = torch.Generator().manual_seed(_SEED)
    random_ids = torch.randint(model.config.get_text_config().vocab_size, (args.short_tokens,), generator=draw)
    sources = {_RANDOM: random_ids, _ITSELF: text.ids[: args.short_tokens]}
    common = {"model": Path(args.model).name, "model_dtype": args.dtype, "text": text.name}
    rows = results.read(args.out)
    whole = Evaluation(model, text.ids, _bar)
    for source, ids in sources.items():
        short = {**common, "measured_on": source, "tokens": len(ids)}
        costs = _costs(Evaluation(model, ids), _layers(model), short, rows, args.out)
        rows += _compared(model, whole, costs, {**common, "measured_on": source, "tokens": args.tokens}, rows)
        results.write(args.out, rows)
    for row in rows:
        if "chosen" in row:
            print(row)


def _costs(
    evaluation: Evaluation, layers: int, common: dict[str, Any], rows: list[dict[str, Any]], out: Path
) -> list[list[float]]:
    """Return what every choice costs in every layer, [layers][choices]; measure and write what is missing."""
    costs: list[list[float]] = []
    for layer in tqdm(range(layers), desc=common["measured_on"]):
        costs.append([])
        for name in _CHOICES:
            wanted = {**common, "layer": layer, "method": name}
            row = _found(rows, wanted)
            if row is None:
                row = {**wanted, "kl_mean": sensitivity(evaluation, variant(name), layer, layers)}
                rows.append(row)
                results.write(out, rows)
            costs[layer].append(row["kl_mean"])
    return costs


def _compared(
    model: Any, whole: Evaluation, costs: Sequence[Sequence[float]], common: dict[str, Any], rows: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the uniform choice and of the best by some costs, on the whole text, that are missing."""
    head_dim = describe(model.config.to_dict()).facts.head_dim
    methods = [variant(name) for name in _CHOICES]
    sizes = [round(8 * method.bytes_per_token_head(head_dim)) for method in methods]
    uniform = _CHOICES.index(_UNIFORM)
    best = cheapest(costs, sizes, len(costs) * sizes[uniform])
    for kind, picks in (("uniform", [uniform] * len(costs)), ("by layer", best)):
        wanted = {**common, "chosen": kind}
        if _found(rows, wanted) is None:
            found = whole.compare(MethodCache([methods[pick] for pick in picks]), kind)
            said = " ".join(_CHOICES[pick].rstrip(":") for pick in picks)
            each = sum(sizes[pick] for pick in picks) / len(picks) / 8
            yield {**wanted, "bytes_per_token_head": each, "kl_mean": found.kl_mean, "top1": found.top1, "layers": said}


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--text", required=True, help="a text of kvarn eval")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--tokens", type=int, default=2048, help="on which choices are compared")
    parser.add_argument("--short-tokens", type=int, default=768, help="on which layers are measured, one by one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    return parser


def _layers(model: Any) -> int:
    count: int = model.config.get_text_config().num_hidden_layers
    return count


def _found(rows: Sequence[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any] | None:
    return next((row for row in rows if wanted.items() <= row.items()), None)


def _bar(parts: Sequence[Any], label: str) -> Any:
    return tqdm(parts, desc=label, unit="chunk", leave=False)


if __name__ == "__main__":
    main()
