"""The write path: what appending and sealing cost in a decode step, and beside the model's own GEMMs in a prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.cases import MAIN_PRESET, Case
from benchmarks.kernels.inputs import make_inputs
from benchmarks.kernels.measure import Bench
from benchmarks.kernels.workload import Workload, build
from kvarn import results
from kvarn.core.append import rotate_rows, store_tail
from kvarn.core.cache import LayerCache, allocate_layer
from kvarn.core.reference import unpack_record
from kvarn.core.seal import append_and_seal, seal, seal_reference
from kvarn.core.step import Step

_PREFILL_TOKENS = 8192
_DECODE_REQUESTS = 64
_DECODE_CONTEXT = 4096
_CHECKED_REQUESTS = 2
_MOST_DIFFERENT_CODES = 1e-3


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer of a model.

    Args:
        name: of the model.
        hidden: width of the residual stream.
        ffn: width of the gated feed-forward.
        q_heads: query heads.
        kv_heads: kv heads.
        head_dim: channels of a head.
    """

    name: str
    hidden: int
    ffn: int
    q_heads: int
    kv_heads: int
    head_dim: int = 128


SHAPES = (Shape("Qwen3-8B", 4096, 12288, 32, 8), Shape("Qwen3-32B", 5120, 25600, 64, 8))


def run(bench: Bench, out: Path, shapes: Sequence[Shape] = SHAPES, tokens: int = _PREFILL_TOKENS) -> bool:
    """Measure shapes; return whether all records were right.

    Args:
        bench: where and how to time.
        out: result file.
        shapes: layers.
        tokens: of the prefill.
    """
    rows = [_measure(shape, bench, tokens) for shape in shapes]
    for row in rows:
        print(
            f"{row['model']}: append, seal and store of {row['tokens']} tokens {row['write_us']:.1f} us, GEMMs of the "
            f"layer {row['gemm_us']:.0f} us: {row['seal_share_of_prefill']:.2%}; decode of {row['requests']}: "
            f"{row['nothing_fills_us_per_layer']:.2f} us, if all fill a tile {row['all_fill_us_per_layer']:.1f} us; "
            f"codes that differ from the reference's {row['different_codes']:.1e}, by at most {row['code_distance']}"
        )
    results.write(out, rows)
    return all(row["code_distance"] <= 1 and row["different_codes"] <= _MOST_DIFFERENT_CODES for row in rows)


def _measure(shape: Shape, bench: Bench, tokens: int) -> dict[str, Any]:
    heads = {"group": shape.q_heads // shape.kv_heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    prefill = _prepared(Case((tokens,), q_len=tokens, sealing=True, **heads), bench)
    decode = [
        _prepared(Case((_DECODE_CONTEXT,) * _DECODE_REQUESTS, sealing=sealing, **heads), bench)
        for sealing in (False, True)
    ]
    distance, different = code_differences(decode[1])
    gemm, write = bench.timer(_gemms(shape, tokens, bench.device), 1), bench.timer(_writes(prefill), 1)
    quiet, busy = (bench.timer(_writes(work), len(work.layers)) for work in decode)
    return {
        "model": shape.name, "preset": MAIN_PRESET, "tokens": tokens, "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim, "gemm_us": gemm.us, "write_us": write.us, "write_us_p10": write.us_p10,
        "write_us_p90": write.us_p90, "seal_share_of_prefill": write.us / gemm.us, "requests": _DECODE_REQUESTS,
        "nothing_fills_us_per_layer": quiet.us, "nothing_fills_us_p10": quiet.us_p10,
        "nothing_fills_us_p90": quiet.us_p90, "all_fill_us_per_layer": busy.us, "all_fill_us_p10": busy.us_p10,
        "all_fill_us_p90": busy.us_p90, "code_distance": distance, "different_codes": different,
    }  # fmt: skip


def _prepared(case: Case, bench: Bench) -> Workload:
    return build(make_inputs(case, bench.device, bench.pool_tiles), bench.l2_bytes, case.contexts[0])


def _writes(work: Workload) -> Callable[[int], None]:
    """Return what rotates, stores and seals a step's rows in one layer, as attention does."""
    inputs, step = work.inputs, work.step

    def write(copy: int) -> None:
        layer = work.layers[copy]
        rotated = append_and_seal(inputs.k, inputs.v, layer, step)
        if not step.stores_first:
            store_tail(rotated, layer, step)

    return write


def _gemms(shape: Shape, tokens: int, device: torch.device) -> Callable[[int], None]:
    """Return the matrix products of one layer over a prefill's tokens."""
    dtype = torch.float16
    q_width, kv_width = shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = [(shape.hidden, q_width + 2 * kv_width), (q_width, shape.hidden), (shape.hidden, 2 * shape.ffn),
             (shape.ffn, shape.hidden)]  # fmt: skip
    pairs = [
        (torch.randn(tokens, rows, dtype=dtype, device=device),
         torch.randn(rows, columns, dtype=dtype, device=device) * rows**-0.5)
        for rows, columns in sizes
    ]  # fmt: skip

    def multiply(_: int) -> None:
        for x, weight in pairs:
            torch.mm(x, weight)

    return multiply


def code_differences(work: Workload) -> tuple[int, float]:
    """Seal on the device and by the reference; return the largest difference of a code and the share that differs."""
    config, step, inputs = work.layers[0].config, work.step, work.inputs
    rotated = rotate_rows(inputs.k, inputs.v, work.layers[0], step, store=True)
    found = []
    for sealer in (seal, seal_reference):
        layer = _empty_like(work.layers[0])
        few = step if sealer is seal else _first_requests(work)
        sealer(rotated, layer, few)
        tile = int(step.seal_tile[0])
        pages = layer.pages_of(step.block_table[:_CHECKED_REQUESTS, tile].long())
        found.append([rows.codes for rows in unpack_record(layer.records[pages], config.layout)])
    differences = [(got - want).abs() for got, want in zip(*found, strict=True)]
    count = sum(int((difference > 0).sum()) for difference in differences)
    return max(int(d.max()) for d in differences), count / sum(d.numel() for d in differences)


def _empty_like(layer: LayerCache) -> LayerCache:
    """Return the same rings and sinks over records of zeros."""
    fresh = allocate_layer(layer.config, layer.records.shape[0], 1, 1, layer.tails.dtype, layer.records.device)
    return LayerCache(layer.config, fresh.records, layer.tails, layer.sinks)


def _first_requests(work: Workload) -> Step:
    """Return the step with the first requests' tiles only: the reference takes a second for each."""
    return replace(
        work.step,
        seal_request=work.step.seal_request[:_CHECKED_REQUESTS],
        seal_tile=work.step.seal_tile[:_CHECKED_REQUESTS],
    )
