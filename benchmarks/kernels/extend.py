"""Prefill: a chunk of queries over cached context, against fp16 attention over the same lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.bars import ERROR_BAR
from benchmarks.kernels.cases import Case
from benchmarks.kernels.gate import Check, compare, dense_expected
from benchmarks.kernels.inputs import Inputs, make_inputs
from benchmarks.kernels.measure import Bench
from benchmarks.kernels.workload import Workload, build
from kvarn import results
from kvarn.core.flash import FlashAttention, Spans, flash_from, flash_reference, torch_flash
from kvarn.core.prefill_plan import LONG_ROWS, Segment
from kvarn.core.restore import restore_reference

_K = 1024
# Rows of the chunk, cached tokens before it. As in one layer of Qwen3-8B.
CHUNKS = (
    (16, 32 * _K), (32, 32 * _K), (64, 32 * _K), (128, 32 * _K), (512, 32 * _K), (2048, 32 * _K), (8192, 32 * _K),
    (64, 4 * _K), (512, 4 * _K), (64, 128 * _K), (2048, 128 * _K), (2048, 0), (8192, 0),
)  # fmt: skip
_GROUP = 4
# Rows above this take the kernels over tiles too long to be worth a look.
_MOST_TILE_ROWS = 512
_CHECKED_ROWS = 8
_MIB = 1 << 20


def run(bench: Bench, out: Path, chunks: Sequence[tuple[int, int]] = CHUNKS) -> bool:
    """Measure every chunk with every flash attention that is there; return whether all outputs were right.

    Args:
        bench: where and how to time.
        out: result file.
        chunks: rows of the chunk, tokens cached before it.
    """
    rows = []
    print("chunk  cached  flash            us    tiles us  fp16 us (best)      speed  workspace MiB  err")
    for chunk, cached in chunks:
        inputs = make_inputs(_case(chunk, cached), bench.device, bench.pool_tiles)
        fp16 = dict(_fp16_times(inputs, bench))
        best = min(fp16, key=lambda name: fp16[name])
        for name, flash in flash_libraries(bench.device).items():
            row = measure(inputs, bench, name, flash)
            row |= {"fp16_us": fp16[best], "fp16_peer": best, "speed_vs_fp16": fp16[best] / row["us"]}
            row["fp16_same_flash_us"] = fp16.get(name)
            rows.append(row)
            print(_line(row), flush=True)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    results.write(out, rows)
    return all(row["rel_err"] <= ERROR_BAR for row in rows)


def _line(row: dict[str, Any]) -> str:
    tiles = "-" if row["tiles_us"] is None else f"{row['tiles_us']:.0f}"
    return (
        f"{row['chunk']:5}  {row['context']:6}  {row['flash']:10} {row['us']:9.0f}  {tiles:>9}  {row['fp16_us']:8.0f} "
        f"{row['fp16_peer']:12} {row['speed_vs_fp16']:5.2f}x  {row['workspace_mib']:8.0f}  {row['rel_err']:.1e}"
    )


def _case(chunk: int, cached: int) -> Case:
    """Return the step; "sealing" makes its length exactly what is asked for."""
    return Case((cached + chunk,), group=_GROUP, q_len=chunk, sealing=True)


def flash_libraries(device: torch.device) -> dict[str, FlashAttention]:
    """Return flash attention as the packages here have it, by name."""
    if device.type != "cuda":
        return {"reference": flash_reference}
    found: dict[str, FlashAttention] = {"torch-fa2": torch_flash}
    try:
        from sgl_kernel.flash_attn import flash_attn_varlen_func
    except ImportError:
        pass
    else:
        found["sglang-fa3"] = flash_from(flash_attn_varlen_func, version=3)
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func as of_vllm
    except ImportError:
        pass
    else:
        found["vllm-fa3"] = flash_from(of_vllm, version=3, fa_version=3)
    return found


def measure(inputs: Inputs, bench: Bench, name: str, flash: FlashAttention) -> dict[str, Any]:
    """Check one chunk, then time it and see what memory it takes beside its output."""
    case = inputs.case
    length = case.seq_lens[0]
    work = build(inputs, 0, length, flash=flash)
    error = check(work).own_error
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    kept = work.run(0).nbytes
    workspace = (torch.cuda.max_memory_allocated() - before - kept) / _MIB if on_gpu else math.nan
    time = bench.timer(work.run, 1)
    tiles = bench.timer(build(inputs, 0, length).run, 1).us if case.q_len <= _MOST_TILE_ROWS else None
    return {
        "chunk": case.q_len, "context": length - case.q_len, "q_heads": case.q_heads, "kv_heads": case.kv_heads,
        "head_dim": case.head_dim, "preset": case.preset,
        # too short to be planned: the kernels over tiles attend
        "flash": name if case.q_len > LONG_ROWS else "tiles",
        "us": time.us, "us_p10": time.us_p10, "us_p90": time.us_p90, "tiles_us": tiles,
        "workspace_mib": workspace, "rel_err": error,
    }  # fmt: skip


def check(work: Workload) -> Check:
    """Compare the chunk's last rows with float64 over the same records and raw rows."""
    inputs, layer = work.inputs, work.layers[0]
    cached = inputs.case.seq_lens[0] - inputs.case.q_len
    stored = layer.tails.clone()
    got = work.run(0)[-_CHECKED_ROWS:]
    layer.tails.copy_(stored)  # the chunk's rows took their place
    keys, values = inputs.k.double(), inputs.v.double()
    if cached:
        count = cached + inputs.case.q_len
        span = torch.tensor([0, count], dtype=torch.int32, device=inputs.device)
        spans = Spans(span, span, count, count)
        segment = Segment(0, slice(None), span[:1], spans, count, restored=True, causal=True, opens=True)
        keys, values = restore_reference(inputs.k, inputs.v, layer, work.step, segment, torch.float64)
    return compare(got, dense_expected(inputs.q[-_CHECKED_ROWS:], keys, values, inputs.scale))


def _fp16_times(inputs: Inputs, bench: Bench) -> Iterator[tuple[str, float]]:
    """Yield microseconds of attention over rows in the model dtype, by implementation."""
    chunk, length = inputs.case.q_len, inputs.case.seq_lens[0]
    k, v = (pool[inputs.pick(length)] for pool in (inputs.key_pool, inputs.value_pool))
    want = dense_expected(inputs.q[-_CHECKED_ROWS:], k, v, inputs.scale)
    ends = [torch.tensor([0, n], dtype=torch.int32, device=inputs.device) for n in (chunk, length)]
    spans = Spans(*ends, chunk, length)
    ways: dict[str, Callable[[int], torch.Tensor]] = {
        name: lambda _, flash=flash: flash(inputs.q, k, v, spans, inputs.scale, 0.0, causal=True)[0]
        for name, flash in flash_libraries(inputs.device).items()
    }
    dense = [x.transpose(0, 1)[None].contiguous() for x in (inputs.q, k, v)]
    mask = causal_lower_right(chunk, length) if chunk < length else None

    def sdpa(_: int) -> torch.Tensor:
        out = scaled_dot_product_attention(
            *dense, attn_mask=mask, is_causal=mask is None, scale=inputs.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    for name, backend in (("sdpa-flash", SDPBackend.FLASH_ATTENTION), ("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION)):
        ways[name] = lambda copy, backend=backend: _with_backend(backend, sdpa, copy)
    for name, way in ways.items():
        try:
            error = compare(way(0)[-_CHECKED_ROWS:], want).own_error
        except RuntimeError as problem:
            print(f"  fp16 {name} can't run: {str(problem).splitlines()[0][:100]}")
            continue
        if math.isnan(error) or error > ERROR_BAR:
            print(f"  fp16 {name} is wrong by {error:.1e} and doesn't count")
            continue
        yield name, bench.timer(way, 1).us


def _with_backend(backend: SDPBackend, call: Callable[[int], torch.Tensor], copy: int) -> torch.Tensor:
    with sdpa_kernel(backend):
        return call(copy)
