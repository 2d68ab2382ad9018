"""`kvarn plan MODEL`: tokens and requests that each cache dtype holds in the memory that an engine gives its cache."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kvarn.errors import CapacityError, KVarNError, UnsupportedConfig

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from kvarn.core.capacity import CacheShape

_GIB = 1 << 30
_NOTE = """\
SGLang keeps exact tails for its request limit (--max-running-requests), vLLM for the requests that run; "at once" are
requests of {context:,} tokens. From the break-even on, a running request is smaller than in {dtype}."""


def add_parser(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("plan", help="predict tokens and requests for a model and a memory budget")
    parser.add_argument("model", help="checkpoint folder or name on a hub")
    parser.add_argument(
        "--memory",
        type=float,
        required=True,
        metavar="GIB",
        help="for the KV cache of one GPU, as the engine prints it",
    )
    parser.add_argument("--context", type=int, default=32768, help="tokens of a request; vLLM's --max-model-len")
    parser.add_argument("--requests", type=int, help="SGLang's --max-running-requests (default: from the memory)")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="RANKS")
    parser.add_argument("--dtype", help="of the model (default: the checkpoint's)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print a line a preset.

    Raises:
        KVarNError: the model is not found, can't be served, or an argument makes no sense.
    """
    from kvarn.checkpoint import describe, read_config
    from kvarn.core.capacity import cache_shape
    from kvarn.core.support import DeviceFacts, unsupported_reasons
    from kvarn.presets import PRESETS

    if min(args.memory, args.context, args.tensor_parallel, 1 if args.requests is None else args.requests) <= 0:
        raise KVarNError("--memory, --context, --requests and --tensor-parallel must be above 0.")
    model = describe(read_config(args.model), args.dtype)
    heads = max(1, model.kv_heads // args.tensor_parallel)
    budget = int(args.memory * _GIB)
    found = f"{model.tile_layers} layers, {heads} kv heads a GPU, head_dim {model.facts.head_dim}, {model.facts.dtype}"
    print(f"{args.model}: {found}; {args.memory:g} GiB for the KV cache")
    print(f"{'':18}{'bytes a':>9} {'SGLang':>21}{'at':>8} {'vLLM':>21}{'at':>8}{'break-':>9}")
    print(f"{'':18}{'token':>9} {'tokens':>14}{'ratio':>7}{'once':>8} {'tokens':>14}{'ratio':>7}{'once':>8}{'even':>9}")
    for name, preset in PRESETS.items():
        if reasons := unsupported_reasons(model.facts, preset, DeviceFacts("cuda")):
            raise UnsupportedConfig(reasons)
        shape = cache_shape(
            preset, layers=model.tile_layers, kv_heads=heads, head_dim=model.facts.head_dim, raw_bytes=model.raw_bytes
        )
        print(_line(name, shape, budget, args.context, args.requests))
    print(_NOTE.format(context=args.context, dtype=model.facts.dtype))
    for command in ("python -m sglang.launch_server --model-path", "vllm serve"):
        print(f"  {command} {args.model} --kv-cache-dtype kvarn_k4v2_g128")


def _line(name: str, shape: CacheShape, budget: int, context: int, requests: int | None) -> str:
    from kvarn.core.capacity import plan_blocks, plan_capacity

    tile = shape.preset.tile_tokens
    line = f"{name:18}{shape.bytes_per_token:9,} "
    try:
        plan = plan_capacity(shape, budget, requests)
        at_once = min(plan.max_requests, plan.tokens // (-(-context // tile) * tile))
        line += f"{plan.tokens:14,}{plan.ratio:7.2f}{at_once:8,} "
    except CapacityError:
        line += f"{'too little memory':>29} "
    at_once = plan_blocks(shape, budget, context)
    tokens = at_once * context
    return (
        line + f"{tokens:14,}{tokens * shape.raw_bytes_per_token / budget:7.2f}{at_once:8,}{shape.break_even_tokens:9,}"
    )
