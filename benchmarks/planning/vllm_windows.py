"""A model with sliding windows in vLLM: what its cache holds and hits. Needs vLLM for the CPU, no GPU.

    python -m benchmarks.planning.vllm_windows --model DIR --out benchmarks/results/hybrid.json

Engines on the CPU are started with the model's dtype and with a preset, in the same memory, with no flag beside the
dtype; a prompt is asked twice. Then vLLM's own planner makes caches for larger models of the family as on a GPU, where
pages of a window may be smaller. Tokens are those of requests of the longest context that can run at once, all
prefilled. (Those that vLLM announces are fewer: it prices every request as one that is being prefilled, whose windows
hold a step's tokens.)
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from kvarn import results
from kvarn.checkpoint import describe, read_config
from kvarn.core.capacity import CacheShape, cache_shape
from kvarn.core.windows import WindowShape
from kvarn.presets import get_preset

_GIB = 1 << 30
_CONTEXT = 32768
_BATCHED_TOKENS = 8192
# Layers, window, query heads, kv heads, head_dim; every sixth layer attends to the whole context.
_GEMMA_3 = {
    "Gemma-3-1B": (26, 512, 4, 1, 256),
    "Gemma-3-4B": (34, 1024, 8, 4, 256),
    "Gemma-3-12B": (48, 1024, 16, 8, 256),
    "Gemma-3-27B": (62, 1024, 32, 16, 128),
}


def main() -> None:
    """Write a row an engine and a row a plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; without it, nothing is started")
    parser.add_argument("--preset", default="kvarn_k4v2_g128")
    parser.add_argument("--budget-gib", type=int, default=20, help="bytes of a planned cache")
    parser.add_argument("--out", type=Path, required=True, help="result file; rows of other engines stay")
    args = parser.parse_args()
    # What engines read, and what keeps them in this process.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    rows = [row for row in results.read(args.out) if not row["engine"].startswith("vllm")]
    if args.model:
        rows += _engine_rows(args.model, args.preset)
    rows += [_planned_row(name, args.preset, args.budget_gib * _GIB) for name in _GEMMA_3]
    results.write(args.out, rows, engine="vllm-cpu")


def _engine_rows(model: str, preset: str) -> list[dict[str, Any]]:
    found = {dtype: _engine_row(model, dtype) for dtype in ("auto", preset)}
    made = describe(read_config(model))
    shape = _shape(preset, made.tile_layers, made.windows(made.kv_heads), made.kv_heads, made.facts.head_dim)
    found[preset] |= {
        "capacity_ratio": round(found[preset]["kv_tokens"] / found["auto"]["kv_tokens"], 3),
        "theory_ratio": _theory(shape, found[preset]["max_model_len"]),
    }
    for row in found.values():
        print(row, flush=True)
    return list(found.values())


def _engine_row(model: str, dtype: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    options = {"dtype": "bfloat16", "max_model_len": _CONTEXT // 4, "kv_cache_memory_bytes": _GIB}
    llm = LLM(model, kv_cache_dtype=dtype, enforce_eager=True, seed=0, **options)
    core = llm.llm_engine.engine_core.engine_core
    tokens = _tokens(core.scheduler.kv_cache_config, options["max_model_len"])
    prompt = {"prompt_token_ids": [2, *range(1000, 2300)]}
    once = SamplingParams(temperature=0, max_tokens=2)
    hits = [llm.generate([prompt], once, use_tqdm=False)[0].num_cached_tokens for _ in range(2)]
    return {
        "engine": "vllm-cpu", "model": Path(model).name, "cache_dtype": dtype,
        "max_model_len": options["max_model_len"], "budget_gib": 1, "kv_tokens": tokens,
        "prompt_tokens": len(prompt["prompt_token_ids"]), "hit_tokens": hits[-1],
    }  # fmt: skip


def _planned_row(name: str, preset: str, budget: int) -> dict[str, Any]:
    from vllm.v1.core import kv_cache_utils as planning

    total, window, _, heads, head_dim = _GEMMA_3[name]
    full = total // 6
    shape = _shape(preset, full, WindowShape(total - full, window, heads, head_dim, 2), heads, head_dim)
    capacity = {}
    for dtype in ("auto", preset):
        config = _config(name, dtype)
        specs = _raw_specs(shape) if dtype == "auto" else _tile_specs(config, shape)
        plan = planning.generate_scheduler_kv_cache_config(planning.get_kv_cache_configs(config, [specs], [budget]))
        capacity[dtype] = _tokens(plan, _CONTEXT)
    row = {
        "engine": "vllm, its planner alone", "model": name, "cache_dtype": preset, "max_model_len": _CONTEXT,
        "budget_gib": budget // _GIB, "kv_tokens": capacity[preset],
        "capacity_ratio": round(capacity[preset] / capacity["auto"], 3), "theory_ratio": _theory(shape, _CONTEXT),
    }  # fmt: skip
    print(row, flush=True)
    return row


def _shape(preset: str, layers: int, windows: WindowShape | None, heads: int, head_dim: int) -> CacheShape:
    return cache_shape(
        get_preset(preset), layers=layers, kv_heads=heads, head_dim=head_dim, raw_bytes=2, windows=windows
    )


def _tokens(plan: Any, context: int) -> int:
    """Return the tokens of requests of so many tokens that the blocks of a plan hold at once, parts counted."""
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    blocks = 0
    for group in plan.kv_cache_groups:
        spec = getattr(group.kv_cache_spec, "first_spec", group.kv_cache_spec)
        if isinstance(spec, SlidingWindowSpec):
            blocks += -(-min(context, spec.sliding_window) // spec.block_size) + 1
        else:
            blocks += getattr(spec, "blocks_per_request", -(-context // spec.block_size))
    return (plan.num_blocks - 1) * context // blocks


def _theory(shape: CacheShape, context: int) -> float:
    """Return what tokens, tail and window alone would give such a request, without any blocks."""
    ours = context * shape.bytes_per_token + shape.tail_bytes_per_request + shape.window_bytes
    return round(shape.raw_request_bytes(context) / ours, 3)


def _config(name: str, dtype: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    layers, window, q_heads, kv_heads, head_dim = _GEMMA_3[name]
    text = {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262144,
        "hidden_size": q_heads * head_dim, "intermediate_size": 4096, "num_hidden_layers": layers,
        "num_attention_heads": q_heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "sliding_window": window,
        "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(text))
        config = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            kv_cache_dtype=dtype,
            max_model_len=_CONTEXT,
            max_num_batched_tokens=_BATCHED_TOKENS,
        ).create_engine_config()
    config.cache_config.kv_cache_layout = "BLHNC"
    return config


def _raw_specs(shape: CacheShape) -> dict[str, Any]:
    """Return the specs of vLLM's own cache, in the model's order of layers."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return _specs(shape, FullAttentionSpec(**_raw(shape, 16)), 16)


def _tile_specs(config: Any, shape: CacheShape) -> dict[str, Any]:
    """Return the specs of records, tails and windows that the adapter makes."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from kvarn.vllm_backend.spec import TailSpec

    tiles = shape.best_tiles_per_block(config.model_config.max_model_len)
    block = tiles * shape.preset.tile_tokens
    records = {"block_size": block, "num_kv_heads": shape.kv_heads, "head_size": shape.head_dim, "dtype": torch.uint8}
    content = shape.layout.record_bytes // shape.preset.tile_tokens
    specs = _specs(shape, FullAttentionSpec(**records, state_content_bytes=content), shape.window_page_tokens(tiles))
    ring_bytes = shape.rings_per_block(tiles) * shape.ring_bytes
    specs["tail"] = TailSpec(
        **records | {"num_kv_heads": 1},
        state_content_bytes=-(-ring_bytes // block),
        blocks_per_request=shape.tail_blocks(tiles),
    )
    return specs


def _specs(shape: CacheShape, full: Any, page_tokens: int) -> dict[str, Any]:
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    assert shape.windows is not None
    window = SlidingWindowSpec(**_raw(shape, page_tokens), sliding_window=shape.windows.tokens)
    layers = shape.layers + shape.windows.layers
    return {f"layers.{i}.attn": window if (i + 1) % 6 else full for i in range(layers)}


def _raw(shape: CacheShape, block: int) -> dict[str, Any]:
    return {
        "block_size": block, "num_kv_heads": shape.kv_heads, "head_size": shape.head_dim, "dtype": torch.bfloat16,
    }  # fmt: skip


if __name__ == "__main__":
    main()
