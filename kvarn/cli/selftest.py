"""`kvarn selftest`: prefill, decode and sealing by the kernels of this machine's GPU, against the torch references."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kvarn.errors import KVarNError

if TYPE_CHECKING:
    from argparse import _SubParsersAction
    from collections.abc import Callable

    import torch

_LAYERS, _KV_HEADS, _GROUP = 1, 2, 4
# Tokens of each request before the two steps that are compared: a chunk of so many rows, then one row each.
_LENGTHS, _CHUNKS = (300, 3), (90, 20)
# Codes on the edge between two values may fall to either side, on a GPU that rounds sums in another order.
_BYTES_APART = 5e-3
_OUTPUT_APART = 5e-3


def add_parser(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("selftest", help="run the kernels of this machine against the references")
    parser.add_argument("presets", nargs="*", help="default: all")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print a line a preset.

    Raises:
        KVarNError: there is no GPU, or a kernel's result is not that of the reference.
    """
    import torch

    from kvarn.presets import PRESETS, get_preset

    if not torch.cuda.is_available():
        raise KVarNError("There is no GPU here: engines run on the references themselves, which need no self-test.")
    wrong = []
    for preset in map(get_preset, args.presets or PRESETS):
        records, outputs = differences(preset.name, args.head_dim, args.dtype, "cuda")
        good = records <= _BYTES_APART and all(output <= _OUTPUT_APART for output in outputs)
        chunk, decode = (f"{output:.1e}" for output in outputs)
        print(f"{preset.name:18} records {records:.1e} of bytes, chunk {chunk}, decode {decode}: "
              f"{'good' if good else 'WRONG'}")  # fmt: skip
        wrong += [] if good else [preset.name]
    if wrong:
        raise KVarNError(f"The kernels give other results than the references for {', '.join(wrong)}.")


def differences(preset_name: str, head_dim: int, dtype_name: str, device: str) -> tuple[float, list[float]]:
    """Run the same steps on a device and by the references on the CPU.

    Returns:
        The share of record bytes that differ, and the relative RMS difference of the outputs of each step.
    """
    import torch

    from kvarn.core.attention import attention, attention_reference
    from kvarn.core.cache import CacheConfig, allocate_layer
    from kvarn.core.capacity import cache_shape
    from kvarn.core.chunk_step import chunk_step
    from kvarn.core.step import decode_step
    from kvarn.core.tail import TailState
    from kvarn.presets import get_preset

    dtype = getattr(torch, dtype_name)
    shape = cache_shape(
        get_preset(preset_name), layers=_LAYERS, kv_heads=_KV_HEADS, head_dim=head_dim, raw_bytes=dtype.itemsize
    )
    config, requests = CacheConfig.of(shape), len(_LENGTHS)
    pages = -(-(max(_LENGTHS) + max(_CHUNKS) + 1) // config.tile_tokens)

    def serve(where: str, attend: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        layer = allocate_layer(config, requests * pages + 1, requests + 1, requests, dtype, where)
        state = TailState(config, requests + 1, requests * pages + 1, requests, torch.device(where))
        rows = torch.arange(1, requests + 1, dtype=torch.int32, device=where)
        table = torch.arange(1, requests * pages + 1, dtype=torch.int32, device=where).view(requests, pages)
        ends = torch.zeros(requests, dtype=torch.int32)
        outputs = []
        for new in (_LENGTHS, _CHUNKS, (1,) * requests):
            starts, ends = ends, ends + torch.tensor(new, dtype=torch.int32)
            if max(new) == 1:
                step = decode_step(state, rows, ends.to(where), table, _GROUP)
            else:
                step, _ = chunk_step(state, rows, starts.to(where), ends.to(where), None, table, _GROUP, int(sum(new)))
            q, k, v = (
                torch.randn(int(sum(new)), heads, head_dim, generator=generator).to(where, dtype)
                for heads in (_GROUP * _KV_HEADS, _KV_HEADS, _KV_HEADS)
            )
            outputs.append(attend(q, k, v, layer, step, config.rotation_norm).float().cpu())
        return layer.records.cpu(), outputs

    (records, found), (expected, wanted) = serve(device, attention), serve("cpu", attention_reference)
    apart = float((records != expected).float().mean())
    return apart, [float((a - b).norm() / b.norm()) for a, b in zip(found[1:], wanted[1:], strict=True)]
