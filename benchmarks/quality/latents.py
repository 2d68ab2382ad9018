"""What 4-bit latents change about a real model's predictions, though no model with latents is at hand.

    python -m benchmarks.quality.latents --model DIR --text prose.txt --out benchmarks/results/latents-cpu.json

Attention over shared keys and values is a case of latent attention (MLA): a token's latent is all its keys, before
rotary embedding, and all its values, and its up-projections are selections. So a Qwen2.5-Coder-0.5B caches latents of
256 real channels, key biases included. What such a model lacks is a rope part: its keys are turned after they are
restored, so their error is what the KL shows, and 8-bit rope parts are not measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvarn import results
from kvarn.core.hadamard import rotate
from kvarn.core.latent.reference import quantise_channels
from kvarn.evaluation import texts
from kvarn.evaluation.method_cache import MethodCache
from kvarn.evaluation.methods import TILE, Method
from kvarn.evaluation.run import Evaluation

# Bits of a code, and tokens that share a channel's scale and offset.
CHOICES = ((4, 128), (4, 64), (3, 128), (8, 128))


class LatentTiles:
    """Restores the tiles of one layer, which come one after the other.

    Args:
        bits: of a code.
        group: tokens of a tile.
        inverse_frequencies: [head_dim / 2], of the rotary embedding.
    """

    def __init__(self, bits: int, group: int, inverse_frequencies: torch.Tensor) -> None:
        self.bits = bits
        self.group = group
        self.errors: list[float] = []
        self._frequencies = inverse_frequencies.double()
        self._start = 0

    def __call__(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values by the latents of a tile, [batch, kv_heads, TILE, head_dim]."""
        position, self._start = torch.arange(self._start, self._start + TILE), self._start + TILE
        angle = (position.double()[:, None] * self._frequencies).repeat(1, 2)
        latent = torch.cat([x.transpose(1, 2).flatten(2) for x in (_turned(k, -angle), v)], dim=-1)
        groups = rotate(latent).unflatten(1, (-1, self.group))
        codes = quantise_channels(groups, self.bits)
        restored = rotate(codes.restore().transpose(-1, -2).flatten(1, 2), inverse=True)
        # without what all tokens share, which is kept exactly
        spread = latent - latent.mean(dim=1, keepdim=True)
        self.errors.append(float((restored - latent).norm() / spread.norm()))
        keys, values = (x.unflatten(2, (k.shape[1], -1)).transpose(1, 2) for x in restored.chunk(2, dim=-1))
        return _turned(keys, angle), values


def main(arguments: list[str] | None = None) -> None:
    """Measure every choice, write the rows."""
    args = _arguments().parse_args(arguments)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = texts.load(str(args.text), AutoTokenizer.from_pretrained(args.model), args.tokens)
    evaluation = Evaluation(model, text.ids, lambda parts, label: tqdm(parts, desc=label, leave=False))
    common = {"model": Path(args.model).name, "text": text.name, "tokens": args.tokens}
    rows = []
    for bits, group in CHOICES:
        rows.append(common | measure(evaluation, model, bits, group))
        print(rows[-1], flush=True)
        results.write(args.out, rows)


def measure(evaluation: Evaluation, model: Any, bits: int, group: int) -> dict[str, Any]:
    """Return the KL of a width and tile, and the latents' relative error, mean over tiles and layers."""
    config = model.config.get_text_config()
    frequencies = model.base_model.rotary_emb.inv_freq
    layers = [LatentTiles(bits, group, frequencies) for _ in range(config.num_hidden_layers)]
    name = f"latent-{bits}-bit-g{group}"
    found = evaluation.compare(MethodCache([Method(name, layer, lambda _: 0.0) for layer in layers]), name)
    errors = [error for layer in layers for error in layer.errors]
    return {
        "bits": bits, "tile_tokens": group, "kl_mean": found.kl_mean, "kl_median": found.kl_median,
        "top1": found.top1, "ppl": found.ppl, "ppl_exact": found.ppl_exact, "rel_err": sum(errors) / len(errors),
    }  # fmt: skip


def _turned(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Turn heads [..., tokens, head_dim] by angles [tokens, head_dim], as rotary embedding does; float32."""
    low, high = x.double().chunk(2, dim=-1)
    return (x.double() * angle.cos() + torch.cat((-high, low), dim=-1) * angle.sin()).float()


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--text", required=True, help="a text of kvarn eval")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--tokens", type=int, default=1024)
    return parser


if __name__ == "__main__":
    main()
