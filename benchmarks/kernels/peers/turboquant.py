"""vLLM's TurboQuant: its preset whose size is nearest to the case's, filled by its own store kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.kernels.gate import checked_requests, dense_expected, relative_rms
from benchmarks.kernels.inputs import Inputs, take_rows
from benchmarks.kernels.operation import Operation
from benchmarks.kernels.peers.paged import BLOCK_TOKENS, shuffled_table
from benchmarks.kernels.peers.registry import CannotRun
from benchmarks.kernels.timing import copies_needed
from kvarn.core.hadamard import sign_matrix
from kvarn.core.layout import TileLayout
from kvarn.presets import get_preset

# vLLM's default of tq_max_kv_splits_for_cuda_graph.
_MAX_SPLITS = 32
_TOLERANCE = 2e-2
_HOLLOW_BLOCKS = 64


def operations(inputs: Inputs, l2_bytes: int, kind: str, hollow: bool) -> Iterator[Operation]:
    """Yield TurboQuant's decode; see `registry.operations`."""
    case, device = inputs.case, inputs.device
    if case.q_len > 1 or case.logit_cap or case.head_dim & (case.head_dim - 1):
        raise CannotRun("TurboQuant decodes one query row, without a logit cap, at a power-of-two head_dim")
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TQ_PRESETS, TurboQuantConfig
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    layout = TileLayout.of(get_preset(case.preset), case.head_dim)
    wanted = layout.payload_bytes / layout.tile_tokens
    configs = {name: TurboQuantConfig.from_cache_dtype(name, case.head_dim) for name in TQ_PRESETS}
    name = min(configs, key=lambda name: abs(configs[name].slot_size_aligned - wanted))
    config = configs[name]
    rotation = (sign_matrix(case.head_dim) / math.sqrt(case.head_dim)).to(device)
    centroids = get_centroids(case.head_dim, config.centroid_bits).to(device)
    pool = _stored_pool(inputs, config, rotation, centroids)

    each = [-(-length // BLOCK_TOKENS) for length in case.seq_lens]
    read = sum(case.seq_lens) * case.kv_heads * config.slot_size
    blocks = _HOLLOW_BLOCKS if hollow else sum(each)
    caches = [_filled(inputs, pool, blocks) for _ in range(1 if hollow else copies_needed(read, l2_bytes))]
    table, seq_lens = shuffled_table(inputs, each, blocks), inputs.seq_lens()
    settings = {
        "mse_bits": config.key_mse_bits,
        "key_packed_size": config.key_packed_size,
        "value_quant_bits": config.effective_value_quant_bits,
        "key_fp8": config.key_fp8,
        "norm_correction": config.norm_correction,
    }

    def run(copy: int) -> torch.Tensor:
        return triton_turboquant_decode_attention(
            inputs.q, caches[copy], table, seq_lens, rotation, centroids, inputs.scale, PiT=rotation,
            max_num_kv_splits=_MAX_SPLITS, **settings,
        )  # fmt: skip

    def error() -> float:
        return _error(inputs, caches[0], table, rotation, centroids, config, run(0))

    note = f"{config.slot_size_aligned} bytes a token and head"
    yield Operation(name, len(caches), run, error, _TOLERANCE, note)


def _stored_pool(inputs: Inputs, config: Any, rotation: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Store the pools' rows with vLLM's kernel: [blocks, BLOCK_TOKENS, kv_heads, slot bytes], uint8."""
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    rows, heads, _ = inputs.key_pool.shape
    pool = torch.zeros(
        rows // BLOCK_TOKENS, BLOCK_TOKENS, heads, config.slot_size_aligned, dtype=torch.uint8, device=inputs.device
    )
    triton_turboquant_store(
        inputs.key_pool, inputs.value_pool, pool, torch.arange(rows, dtype=torch.int32, device=inputs.device),
        rotation, (centroids[:-1] + centroids[1:]) / 2, config.key_mse_bits, config.key_packed_size,
        config.effective_value_quant_bits, key_fp8=config.key_fp8,
    )  # fmt: skip
    return pool


def _filled(inputs: Inputs, pool: torch.Tensor, blocks: int) -> torch.Tensor:
    cache = torch.empty(blocks, *pool.shape[1:], dtype=torch.uint8, device=pool.device)
    take_rows(pool, inputs.pick(blocks, limit=pool.shape[0]), cache)
    return cache


def _error(
    inputs: Inputs, cache: torch.Tensor, table: torch.Tensor, rotation: torch.Tensor, centroids: torch.Tensor,
    config: Any, out: torch.Tensor,
) -> float:  # fmt: skip
    """Return the relative RMS error over the rows that vLLM's own kernel restores; keys come back rotated."""
    seq_lens = inputs.case.seq_lens
    requests = checked_requests(seq_lens)
    want = []
    for request in requests:
        k, v = _restored(cache, table[request : request + 1], centroids, config, seq_lens[request], out.shape[-1])
        q = inputs.q[request][None].double()
        q = q if config.key_fp8 else q @ rotation.double()
        want.append(dense_expected(q, k, v, inputs.scale))
    return relative_rms(out[requests], torch.cat(want))


def _restored(
    cache: torch.Tensor, table: torch.Tensor, centroids: torch.Tensor, config: Any, length: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of one request, [positions, kv_heads, head_dim], float16."""
    from vllm.v1.attention.ops.triton_turboquant_decode import _tq_full_dequant_kv, _use_fp8_e4b15

    heads = cache.shape[2]
    k, v = (torch.empty(1, heads, length, head_dim, dtype=torch.float16, device=cache.device) for _ in range(2))
    _tq_full_dequant_kv[(length, heads)](
        cache, table, centroids, k, v, *k.stride()[:3], *v.stride()[:3], *cache.stride()[:3], table.stride(0),
        HEAD_DIM=head_dim, BLOCK_SIZE=BLOCK_TOKENS, NUM_KV_HEADS=heads,
        MSE_BYTES=math.ceil(head_dim * config.key_mse_bits / 8), KPS=config.key_packed_size,
        VQB=config.effective_value_quant_bits, VAL_DATA_BYTES=math.ceil(head_dim * config.value_quant_bits / 8),
        MSE_BITS=config.key_mse_bits, KEY_FP8=int(config.key_fp8), BLOCK_D=1 << (head_dim - 1).bit_length(),
        NORM_CORRECTION=int(config.norm_correction), FP8_E4B15=_use_fp8_e4b15(cache.device.index or 0), num_warps=4,
    )  # fmt: skip
    return k[0].transpose(0, 1), v[0].transpose(0, 1)
