"""Which layers of a model with sliding windows may be quantised: KL by layer type, for several quantisers.

    python -m benchmarks.quality.windows --model DIR --text prose.txt --out benchmarks/results/hybrid.json

In transformers, on whatever device there is. The preset runs through its own cache: tiles in the layers that attend to
the whole context, the model's dtype in the others. Other rows change tiles in the layers named, and in those alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvarn import results
from kvarn.checkpoint import describe
from kvarn.core.layers import LayerKind
from kvarn.evaluation import texts
from kvarn.evaluation.method_cache import MethodCache
from kvarn.evaluation.methods import UNCHANGED, Method, methods
from kvarn.evaluation.names import is_variant_name
from kvarn.evaluation.run import Evaluation
from kvarn.evaluation.variants import variant

PRESET = "kvarn_k4v2_g128"
CHOICES = {
    "full attention": {LayerKind.TILES},
    "windows": {LayerKind.MODEL_DTYPE},
    "all": {LayerKind.TILES, LayerKind.MODEL_DTYPE},
}
METHODS = ("k4v2:", "int4-per-token", "published-k4v4")
KEY = ("engine", "model", "method", "layers", "text", "tokens")


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, row by row."""
    args = _arguments().parse_args(arguments)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    text = texts.load(str(args.text), AutoTokenizer.from_pretrained(args.model), args.tokens)
    evaluation = Evaluation(model, text.ids, _bar, text.turns)
    kinds = describe(model.config.to_dict()).layers
    common = {"engine": "transformers", "model": Path(args.model).name, "text": text.name, "tokens": args.tokens}
    rows = results.read(args.out)
    done = {tuple(row.get(name) for name in KEY) for row in rows}
    for method, layers in ((PRESET, "full attention"), *((m, layers) for m in METHODS for layers in CHOICES)):
        row = {**common, "method": method, "layers": layers, "model_dtype": args.dtype}
        if tuple(row[name] for name in KEY) in done:
            continue
        if method == PRESET:
            row |= evaluation.row(method)
        else:
            chosen = [_method(method) if kind in CHOICES[layers] else UNCHANGED for kind in kinds]
            found = evaluation.compare(MethodCache(chosen), f"{method} in {layers}")
            row |= {name: float(f"{getattr(found, name):.6g}") for name in ("kl_mean", "kl_median", "kl_p99", "top1")}
        print(f"{method} in {layers}: KL {row['kl_mean']:.5f}, equal argmax {row['top1']:.3f}", flush=True)
        rows.append(row)
        results.write(args.out, rows)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def _method(name: str) -> Method:
    return variant(name) if is_variant_name(name) else methods()[name]


def _bar(parts: Sequence[Any], label: str) -> Iterable[Any]:
    bar: Iterable[Any] = tqdm(parts, desc=label, unit="chunk", leave=False)
    return bar


if __name__ == "__main__":
    main()
