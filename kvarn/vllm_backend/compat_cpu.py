"""vLLM's own attention on the CPU beside ours, as layers with a window and draft models have it. Nothing on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvarn.patching import wrap_once


def stand_beside_ours() -> None:
    """Let vLLM's attention on the CPU share blocks with records.

    It says that it reads one layout only, but takes a cache's strides as they are and so reads ours, too. And its
    runner, unlike that for GPUs, does not clear new blocks of layers with a window: there attention weighs rows that no
    token has written by 0, and if they are bytes of a record, taken for numbers, they may be NaN.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    layouts = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
    CPUAttentionBackend.supported_kv_cache_layouts = classmethod(lambda _: layouts)

    def zero_in_all_layers(original: Callable[..., None], runner: Any, block_ids: list[int]) -> None:
        for layer in runner.compilation_config.static_forward_context.values():
            if getattr(layer, "attn_backend", None) is CPUAttentionBackend:
                layer.kv_cache[block_ids] = 0
        original(runner, block_ids)

    wrap_once(CPUModelRunner, "_zero_block_ids", zero_in_all_layers)
