"""What it costs to fold the rotation of values into a model's weights, which are then rounded to 16 bits again.

    python -m benchmarks.quality.fold --model DIR --text prose.txt --out benchmarks/results/fold-cpu.json

No cache is quantised. Each row compares two runs of a model over one text. Its weights are the checkpoint's, rounded to
`model_dtype`: as they are and computed in float32, against what `changed` says. "Folded weights" is what rounding them
again costs; "arithmetic" and "arithmetic, folded weights" say if that shows where a model computes in 16 bits anyway.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvarn import results
from kvarn.core.hadamard import rotate
from kvarn.evaluation import texts
from kvarn.evaluation.divergence import divergence

_EXACT = torch.float32
_FIGURES = ("kl_mean", "kl_median", "kl_p99", "top1", "ppl", "ppl_exact")


def main(arguments: list[str] | None = None) -> None:
    """Measure a model, add its rows to the file."""
    args = _arguments().parse_args(arguments)
    text = texts.load(str(args.text), AutoTokenizer.from_pretrained(args.model), args.tokens)
    common = {"model": Path(args.model).name, "text": text.name, "tokens": args.tokens}
    rows = [row for row in results.read(args.out) if row["model"] != common["model"]]
    for row in measure(args.model, text.ids):
        print(row, flush=True)
        rows.append(common | row)
        results.write(args.out, rows)


def measure(model: str, ids: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Yield the rows of a checkpoint over a text, [tokens]."""
    for dtype in (torch.bfloat16, torch.float16):
        exact = _load(model, dtype, _EXACT)
        head, wanted = exact.get_output_embeddings(), _states(exact, ids)
        changed = {
            "folded weights": folded(_load(model, dtype, _EXACT), dtype),
            "arithmetic": _load(model, dtype, dtype),
            "arithmetic, folded weights": folded(_load(model, dtype, dtype), dtype),
        }
        for name, made in changed.items():
            found = dataclasses.asdict(divergence(head, wanted, _states(made, ids), ids))
            figures = {figure: float(f"{found[figure]:.4g}") for figure in _FIGURES}
            yield {"model_dtype": str(dtype).removeprefix("torch."), "changed": name, **figures}


@torch.no_grad()
def folded(model: Any, dtype: torch.dtype) -> Any:
    """Multiply the rotation into the projections of values and its inverse into those of outputs; round to a dtype."""
    for layer in model.base_model.layers:
        attention = layer.self_attn
        values, width = attention.v_proj, attention.head_dim
        parts = [values.weight] + ([values.bias] if values.bias is not None else [])
        for part in parts:
            heads = part.float().unflatten(0, (-1, width)).movedim(1, -1)
            part.copy_(rotate(heads).movedim(-1, 1).flatten(0, 1).to(dtype))
        weight = attention.o_proj.weight
        # columns times the rotation are rows times its inverse's transpose, which is the rotation
        weight.copy_(rotate(weight.float().unflatten(1, (-1, width))).flatten(1).to(dtype))
    return model


def _load(model: str, dtype: torch.dtype, computed_in: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(computed_in).eval()


@torch.no_grad()
def _states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the final hidden states, [tokens, hidden], float32."""
    states: torch.Tensor = model.base_model(ids[None]).last_hidden_state[0].float()
    return states


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--text", required=True, help="a text of kvarn eval")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--tokens", type=int, default=2048)
    return parser


if __name__ == "__main__":
    main()
