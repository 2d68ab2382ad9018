"""KVarN against the model dtype in an engine: capacity, KL, greedy agreement and decode speed at the same memory.

    python -m benchmarks.serving.compare --engine vllm --model DIR --text FILE --out benchmarks/results/vllm-h100.json

KL is that of the next-token distributions over prose which is prefilled in chunks of one tile, so that the context is
read from records as in decode. Logits are computed here, in float32, from the hidden states that the engine's own
language model head reads. No speed is reported if the KL is above the bar. Other cache dtypes of the engine may be
named as peers; one that can't run is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.serving.engines import BASELINE, ENGINES, add_arguments, add_dtype_arguments, started_with
from benchmarks.serving.jobs import EngineFailed, run_job
from kvarn import results
from kvarn.evaluation.divergence import divergence
from kvarn.presets import is_preset_name

_KL_BAR = 0.0035
_HIT_NEW = 512
_HIT_REPEATS = 5
_QUALITY = ("kl_mean", "kl_median", "kl_p99", "top1", "ppl", "ppl_exact")


def main() -> None:
    """Measure every dtype in a process of its own, compare, write the rows."""
    args = _arguments()
    ids = read_tokens(args.model, args.text)
    head = _head_weight(args.model)
    quality: dict[str, dict[str, float]] = {}
    served: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = ids[: args.kl_tokens]
        dtypes = [BASELINE, *args.dtypes]
        states = _prefill_side_by_side(args, dtypes, text, work)
        for dtype in dtypes:
            try:
                hidden = states.get(dtype)
                if hidden is None:
                    hidden = _hidden_states(args, dtype, text, work)
                quality[dtype] = _quality(head, states.setdefault(BASELINE, hidden), hidden, text)
                print(f"{dtype}: {quality[dtype]}", flush=True)
                _check_quality(dtype, quality[dtype], args.kl_bar)
                served[dtype] = _serve(args, dtype, ids, work)
                _write(args, quality, served)
            except EngineFailed as error:
                if dtype == BASELINE or is_preset_name(dtype):
                    sys.exit(str(error))
                print(f"{dtype} is left out: {error}", flush=True)
    for row in _write(args, quality, served):
        print(json.dumps(row))


def _check_quality(dtype: str, figures: dict[str, float], bar: float) -> None:
    """Stop before a speed is measured whose answers are not good enough; peers are only reported."""
    if is_preset_name(dtype) and figures["kl_mean"] > bar:
        sys.exit(f"{dtype} has a mean KL of {figures['kl_mean']:.5f}, above {bar}: no speed is reported.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    add_dtype_arguments(parser)
    parser.add_argument("--text", type=Path, required=True, help="prose, a plain text file")
    parser.add_argument("--kl-tokens", type=int, default=4096)
    parser.add_argument("--kl-bar", type=float, default=_KL_BAR)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--hit", type=int, default=31744, help=f"cached tokens before {_HIT_NEW} new ones whose first answer is timed"
    )
    return parser.parse_args()


def read_tokens(model: str, text: Path) -> list[int]:
    """Return the ids of a text file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)(text.read_text())["input_ids"]


def cut_prompts(ids: list[int], count: int, length: int) -> list[list[int]]:
    """Return prompts of one length that begin evenly over a text."""
    stride = max(1, (len(ids) - length) // count)
    return [ids[i * stride : i * stride + length] for i in range(count)]


def model_config(model: str) -> dict[str, Any]:
    """Return a checkpoint's config."""
    return json.loads((Path(model) / "config.json").read_text())


def _engine_arguments(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    return started_with(
        args.engine, args.model, args.model_dtype, dtype, args.requests, args.arguments, args.baseline_arguments
    )


def _prefill_side_by_side(
    args: argparse.Namespace, dtypes: list[str], ids: list[int], work: Path
) -> dict[str, torch.Tensor]:
    """Return the hidden states of all dtypes whose engines ran beside each other; the others are for running alone."""

    def prefill(dtype: str) -> torch.Tensor | None:
        try:
            return _hidden_states(args, dtype, ids, work)
        except EngineFailed:
            return None

    with ThreadPoolExecutor(len(dtypes)) as pool:
        found = dict(zip(dtypes, pool.map(prefill, dtypes), strict=True))
    return {dtype: hidden for dtype, hidden in found.items() if hidden is not None}


def _hidden_states(args: argparse.Namespace, dtype: str, ids: list[int], work: Path) -> torch.Tensor:
    """Return the final hidden states of a prefill in chunks of one tile, [tokens, hidden], float32."""
    file = work / f"{dtype}.hidden"
    file.unlink(missing_ok=True)
    arguments = {**_engine_arguments(args, dtype), **ENGINES[args.engine].prefill_arguments(file)}
    run_job(args.engine, {"engine": arguments, "prefill": {"ids": ids, "file": str(file)}}, work, f"kl-{dtype}")
    width = model_config(args.model)["hidden_size"]
    hidden = np.fromfile(file, dtype=np.float16).reshape(-1, width)[: len(ids)]
    if len(hidden) != len(ids):
        raise EngineFailed(f"The hook saw {len(hidden)} of {len(ids)} tokens.")
    return torch.from_numpy(hidden.astype(np.float32))


def _quality(head: torch.Tensor, reference: torch.Tensor, hidden: torch.Tensor, ids: list[int]) -> dict[str, float]:
    """Return what a cache changes about the predictions over a text."""
    found = divergence(lambda rows: rows.to(head.device) @ head.T, reference, hidden, torch.tensor(ids))
    return {name: getattr(found, name) for name in _QUALITY}


def _head_weight(model: str) -> torch.Tensor:
    """Return the weights of the language model head, float32, on the GPU if there is one."""
    from safetensors import safe_open

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(model)
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        with safe_open(folder / where.get(name, "model.safetensors"), framework="pt") as weights:
            if name in weights.keys():  # noqa: SIM118 (safe_open is no mapping)
                return weights.get_tensor(name).to(device, torch.float32)
    sys.exit(f"{model} has no weights of a language model head.")


def _serve(args: argparse.Namespace, dtype: str, ids: list[int], work: Path) -> dict[str, Any]:
    prompts = cut_prompts(ids, args.prompts, args.prompt_tokens)
    vocab = model_config(args.model)["vocab_size"]
    case = {"context": args.context, "new_tokens": args.decode_tokens, "repeats": args.repeats, "vocab": vocab}
    job = {
        "engine": _engine_arguments(args, dtype),
        "greedy": {"prompts": prompts, "new_tokens": args.new_tokens},
        "decode": [{"batch": batch, **case} for batch in args.batches],
        "hit": {"cached": args.hit, "new_tokens": _HIT_NEW, "repeats": _HIT_REPEATS, "vocab": vocab},
    }
    return run_job(args.engine, job, work, f"serve-{dtype}")


def _write(
    args: argparse.Namespace, quality: dict[str, dict[str, float]], served: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Write what is measured up to now: a run that is killed keeps it."""
    rows = [row for dtype in served for row in _rows(args, dtype, quality[dtype], served)]
    results.write(args.out, rows, engine=args.engine)
    return rows


def _rows(
    args: argparse.Namespace, dtype: str, quality: dict[str, float], served: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    baseline, mine = served[BASELINE], served[dtype]
    diverged = sorted(first_divergence(a, b) for a, b in zip(baseline["greedy"], mine["greedy"], strict=True))
    quartiles = statistics.quantiles(diverged, n=4) if len(diverged) > 1 else [diverged[0]] * 3
    common = {
        "engine": args.engine,
        "model": Path(args.model).name,
        "model_dtype": args.model_dtype,
        "dtype": args.model_dtype if dtype == BASELINE else dtype,
        "max_running_requests": args.requests,
        "kv_tokens": mine["kv_tokens"],
        "capacity_ratio": round(mine["kv_tokens"] / baseline["kv_tokens"], 3),
        "kl_tokens": args.kl_tokens,
        **{key: round(value, 6) for key, value in quality.items()},
        "greedy_prompts": len(diverged),
        "greedy_new_tokens": args.new_tokens,
        "greedy_equal": sum(at == args.new_tokens for at in diverged),
        "first_divergence_p25": quartiles[0],
        "first_divergence_median": quartiles[1],
        "first_divergence_p75": quartiles[2],
        **{key: round(value, 2) for key, value in mine["hit"].items()},
    }
    return [{**common, **{k: round(v, 2) for k, v in case.items()}} for case in mine["decode"]]


def first_divergence(a: list[int], b: list[int]) -> int:
    """Return the first place at which two answers differ; their length if none does."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


if __name__ == "__main__":
    main()
