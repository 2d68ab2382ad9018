"""`kvarn plan MODEL`: tokens and requests that each cache dtype holds in the memory that an engine gives its cache."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from kvarn.errors import CapacityError, KVarNError, UnsupportedConfig

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from kvarn.checkpoint import Checkpoint
    from kvarn.core.capacity import CacheShape

_GIB = 1 << 30
_NOTE = """\
SGLang keeps exact tails for its request limit (--max-running-requests), vLLM for the requests that run; "at once" are
requests of {context:,} tokens. From the break-even on, a running request is smaller than in {dtype}."""
_WINDOWS = "Layers with a window keep the newest {tokens:,} tokens of each running request in {dtype}, counted above."
_STATES = "Recurrent states are not counted above: they take the same memory in any cache dtype."
_LATENTS = "Latents take the bits of the preset's keys; KVARN_ROPE_BITS=8 makes their rope parts smaller."


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
    from kvarn.core.layers import summary
    from kvarn.core.support import DeviceFacts, unsupported_reasons
    from kvarn.presets import PRESETS
    from kvarn.sglang_backend.compat_tables import BESIDE_TILES as IN_SGLANG
    from kvarn.vllm_backend.compat_tables import BESIDE_TILES as IN_VLLM

    if min(args.memory, args.context, args.tensor_parallel, 1 if args.requests is None else args.requests) <= 0:
        raise KVarNError("--memory, --context, --requests and --tensor-parallel must be above 0.")
    model = describe(read_config(args.model), args.dtype)
    budget = int(args.memory * _GIB)
    kinds, facts = summary(model.layers), model.facts
    heads = f"{model.heads_of_rank(args.tensor_parallel)} kv heads a GPU, head_dim {facts.head_dim}"
    if facts.latent_dims:
        heads = "latents of {} + {} channels".format(*facts.latent_dims)
    print(f"{args.model}: layers: {kinds}; {heads}, {facts.dtype}")
    print(f"{args.memory:g} GiB for the KV cache")
    print(f"{'':18}{'bytes a':>9} {'SGLang':>21}{'at':>8} {'vLLM':>21}{'at':>8}{'break-':>9}")
    print(f"{'':18}{'token':>9} {'tokens':>14}{'ratio':>7}{'once':>8} {'tokens':>14}{'ratio':>7}{'once':>8}{'even':>9}")
    for name, preset in PRESETS.items():
        if reasons := unsupported_reasons(facts, preset, DeviceFacts("cuda"), IN_VLLM, latents=True):
            raise UnsupportedConfig(reasons)
        shape = model.shape(preset, args.tensor_parallel)
        in_sglang = not unsupported_reasons(facts, preset, DeviceFacts("cuda"), IN_SGLANG, latents=True)
        sglang = _in_sglang(shape, budget, args.context, args.requests) if in_sglang else f"{'not served':>29}"
        print(f"{name:18}{shape.bytes_per_token:9,} {sglang} {_in_vllm(shape, budget, args.context)}")
    _print_notes(args, model, in_sglang=in_sglang)


def _print_notes(args: argparse.Namespace, model: Checkpoint, *, in_sglang: bool) -> None:
    from kvarn.core.layers import LayerKind

    dtype = model.facts.dtype
    print(_NOTE.format(context=args.context, dtype=dtype))
    if model.facts.latent_dims:
        print(_LATENTS)
    if LayerKind.MODEL_DTYPE in model.layers:
        print(_WINDOWS.format(tokens=model.window, dtype=dtype))
    if LayerKind.RECURRENT in model.layers:
        print(_STATES)
    for command in ("python -m sglang.launch_server --model-path",) * in_sglang + ("vllm serve",):
        print(f"  {command} {args.model} --kv-cache-dtype kvarn_k4v2_g128")


def _in_sglang(shape: CacheShape, budget: int, context: int, requests: int | None) -> str:
    from kvarn.core.capacity import plan_capacity
    from kvarn.core.window_pool import WindowPool, scaled_ratio
    from kvarn.sglang_backend.compat_tables import WINDOW_RATIO

    tile, windows = shape.preset.tile_tokens, shape.windows
    shape = replace(shape, windows=None)
    try:
        if windows is None:
            plan = plan_capacity(shape, budget, requests)
            tokens, ratio, most = plan.tokens, plan.ratio, plan.max_requests
        else:
            pool = WindowPool(shape, windows, scaled_ratio(shape, WINDOW_RATIO))
            fitting = pool.most_requests(budget)
            limit = min(fitting, shape.default_max_requests(budget)) if requests is None else requests
            tokens, most = pool.tokens(plan_capacity(shape, budget, limit)), min(fitting, limit)
            ratio = tokens * (shape.raw_bytes_per_token + WINDOW_RATIO * pool.bytes_per_token) / budget
    except CapacityError:
        return f"{'too little memory':>29}"
    at_once = min(most, tokens // (-(-context // tile) * tile))
    return f"{tokens:14,}{ratio:7.2f}{at_once:8,}"


def _in_vllm(shape: CacheShape, budget: int, context: int) -> str:
    from kvarn.core.capacity import plan_blocks

    # vLLM chooses a block's tiles only where caches of two dtypes share blocks.
    tiles = shape.best_tiles_per_block(context) if shape.windows else 1
    at_once = plan_blocks(shape, budget, context, tiles)
    ratio = at_once * shape.raw_request_bytes(context) / budget
    return f"{at_once * context:14,}{ratio:7.2f}{at_once:8,}{shape.break_even_tokens:9,}"
