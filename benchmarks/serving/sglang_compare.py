"""KVarN against the model dtype in SGLang: capacity, KL, greedy agreement and decode speed at the same memory.

    python -m benchmarks.serving.sglang_compare --model DIR --text FILE --out benchmarks/results/sglang-h100.json

KL is that of the next-token distributions over prose which is prefilled in chunks of one tile, so that the context is
read from records as in decode. Logits are computed here, in float32, from the hidden states that the engine's own
language model head reads. No speed is reported if the KL is above the bar.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import results

_TILE = 128
_KL_BAR = 0.0035
_BASELINE = "auto"
_KL_BLOCK = 256


def main() -> None:
    """Measure every dtype in a process of its own, compare, write the rows."""
    args = _arguments()
    ids = _tokens(args.model, args.text)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        hidden = {dtype: _hidden_states(args, dtype, ids[: args.kl_tokens], work) for dtype in args.dtypes}
        head = _head_weight(args.model)
        quality = {dtype: _divergence(head, hidden[_BASELINE], hidden[dtype]) for dtype in args.dtypes}
        for dtype, figures in quality.items():
            print(f"{dtype}: {figures}", flush=True)
            if figures["kl_mean"] > args.kl_bar:
                sys.exit(
                    f"{dtype} has a mean KL of {figures['kl_mean']:.5f}, above {args.kl_bar}: no speed is reported."
                )
        served = {dtype: _serve(args, dtype, ids, work) for dtype in args.dtypes}
    rows = [row for dtype in args.dtypes for row in _rows(args, dtype, quality[dtype], served)]
    results.write(args.out, rows, engine="sglang")
    for row in rows:
        print(json.dumps(row))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--text", type=Path, required=True, help="prose, a plain text file")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--dtypes", nargs="+", default=[_BASELINE, "kvarn_k4v2_g128"], help="the baseline comes first")
    parser.add_argument("--model-dtype", default="float16")
    parser.add_argument("--engine", type=json.loads, default={}, help="more arguments of every engine, JSON")
    parser.add_argument("--baseline-engine", type=json.loads, default={}, help="more arguments of the baseline's, JSON")
    parser.add_argument("--requests", type=int, default=64, help="running requests allowed")
    parser.add_argument("--kl-tokens", type=int, default=4096)
    parser.add_argument("--kl-bar", type=float, default=_KL_BAR)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def _tokens(model: str, text: Path) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)(text.read_text())["input_ids"]


def _model_config(model: str) -> dict[str, Any]:
    return json.loads((Path(model) / "config.json").read_text())


def _engine_arguments(args: argparse.Namespace, dtype: str, extra: dict[str, Any]) -> dict[str, Any]:
    common = {"model_path": args.model, "dtype": args.model_dtype, "kv_cache_dtype": dtype, "random_seed": 0}
    baseline = {"page_size": _TILE, **args.baseline_engine} if dtype == _BASELINE else {}
    return {**common, "skip_server_warmup": True, "log_level": "info", **args.engine, **baseline, **extra}


def _run(job: dict[str, Any], work: Path, name: str) -> dict[str, Any]:
    path, result = work / f"{name}.json", work / f"{name}.result.json"
    path.write_text(json.dumps({**job, "result": str(result)}))
    log_dir = Path(os.environ.get("KVARN_BENCH_LOGS", work))
    with (log_dir / f"{name}.log").open("w") as log:
        command = [sys.executable, "-m", "benchmarks.serving.sglang_worker", str(path)]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code or not result.exists():
        sys.exit(f"The engine for {name} failed with code {code}:\n{(log_dir / f'{name}.log').read_text()[-4000:]}")
    return json.loads(result.read_text())


def _hidden_states(args: argparse.Namespace, dtype: str, ids: list[int], work: Path) -> torch.Tensor:
    """Return the final hidden states of a prefill in chunks of one tile, [tokens, hidden], float32."""
    file = work / f"{dtype}.hidden"
    hook = {
        "name": "hidden",
        "target_modules": ["model.norm"],
        "hook_factory": "benchmarks.serving.capture:save_hidden",
        "config": {"file": str(file)},
    }
    extra = {"chunked_prefill_size": _TILE, "disable_cuda_graph": True, "forward_hooks": [hook]}
    _run({"engine": _engine_arguments(args, dtype, extra), "prefill": {"ids": ids}}, work, f"kl-{dtype}")
    width = _model_config(args.model)["hidden_size"]
    hidden = np.fromfile(file, dtype=np.float16).reshape(-1, width)[: len(ids)]
    if len(hidden) != len(ids):
        sys.exit(f"The hook saw {len(hidden)} of {len(ids)} tokens.")
    return torch.from_numpy(hidden.astype(np.float32))


def _divergence(head: torch.Tensor, reference: torch.Tensor, hidden: torch.Tensor) -> dict[str, float]:
    """Return KL(reference || hidden) of the next-token distributions and the share of equal argmax."""
    kl, same = [], []
    for p_rows, q_rows in zip(reference.split(_KL_BLOCK), hidden.split(_KL_BLOCK), strict=True):
        p = torch.log_softmax(p_rows.to(head.device) @ head.T, dim=-1)
        q = torch.log_softmax(q_rows.to(head.device) @ head.T, dim=-1)
        kl.append((p.exp() * (p - q)).sum(dim=-1).cpu())
        same.append((p.argmax(dim=-1) == q.argmax(dim=-1)).cpu())
    values = torch.cat(kl).double()
    return {
        "kl_mean": float(values.mean()),
        "kl_median": float(values.median()),
        "kl_p99": float(values.quantile(0.99)),
        "top1": float(torch.cat(same).double().mean()),
    }


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
    stride = max(1, (len(ids) - args.prompt_tokens) // args.prompts)
    prompts = [ids[i * stride : i * stride + args.prompt_tokens] for i in range(args.prompts)]
    vocab = _model_config(args.model)["vocab_size"]
    case = {"context": args.context, "new_tokens": args.decode_tokens, "repeats": args.repeats, "vocab": vocab}
    job = {
        "engine": _engine_arguments(args, dtype, {"max_running_requests": args.requests}),
        "greedy": {"prompts": prompts, "new_tokens": args.new_tokens},
        "decode": [{"batch": batch, **case} for batch in args.batches],
    }
    return _run(job, work, f"serve-{dtype}")


def _rows(
    args: argparse.Namespace, dtype: str, quality: dict[str, float], served: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    baseline, mine = served[_BASELINE], served[dtype]
    diverged = sorted(_first_divergence(a, b) for a, b in zip(baseline["greedy"], mine["greedy"], strict=True))
    quartiles = statistics.quantiles(diverged, n=4) if len(diverged) > 1 else [diverged[0]] * 3
    common = {
        "engine": "sglang",
        "model": Path(args.model).name,
        "model_dtype": args.model_dtype,
        "dtype": args.model_dtype if dtype == _BASELINE else dtype,
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
    }
    return [{**common, **{k: round(v, 2) for k, v in case.items()}} for case in mine["decode"]]


def _first_divergence(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


if __name__ == "__main__":
    main()
