"""TileAttentionBackend: SGLang's attention over the tile cache. Every method hands over to the core."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from kvarn.core.attention import attention
from kvarn.core.flash import flash_for
from kvarn.core.prefill_plan import plan_prefill
from kvarn.core.step import Step
from kvarn.core.warm_up import warm_up
from kvarn.sglang_backend import compat, compat_layers
from kvarn.sglang_backend.metadata import StepBuilder
from kvarn.sglang_backend.pool import TilePool

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class TileAttentionBackend(AttentionBackend):
    """Attention over records, exact tails and sinks.

    Args:
        runner: SGLang's model runner, its pools in place.

    Raises:
        EngineIncompatible: a hook of the plugin didn't take.
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        compat.verify_active(runner)
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.max_context_len = runner.model_config.context_len
        pool: TilePool = compat_layers.tile_pool_of(runner.token_to_kv_pool)
        self._layers = dict(zip(compat_layers.layer_ids(runner.kv_cache_configurator), pool.layers, strict=True))
        self._builder = self._make_builder(pool, compat.query_heads(runner), runner)
        self.forward_metadata: Step | None = None
        self._draft_tokens = pool.state.config.draft_tokens
        self._verify_mask = compat.verify_mask(runner) if self._draft_tokens else None

    def _make_builder(self, pool: TilePool, q_heads: int, runner: ModelRunner) -> StepBuilder:
        """Return what describes steps, and compile what they launch."""
        tails, table = pool.layers[0].tails, runner.req_to_token_pool.req_to_token
        flash = flash_for(
            pool.state.config,
            tails.dtype,
            tails.device,
            caps_logits=compat.caps_logits(runner),
            engine=compat.flash_attention(tails.device),
        )
        warm_up(pool.layers[0], q_heads, flash, compat.learned_sinks(runner))
        plan = partial(plan_prefill, pool.state.config, flash, tails.dtype, device=tails.device)
        return StepBuilder(pool.state, pool.layers, table, q_heads // pool.head_num, plan)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Describe a chunk. A step that decodes or verifies is described inside the graph."""
        mode = forward_batch.forward_mode
        if not (mode.is_decode_or_idle() or mode.is_target_verify()):
            self.forward_metadata = self._builder.chunk(forward_batch)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Describe a step that decodes or verifies. Graph-safe: yes."""
        if forward_batch.forward_mode.is_decode():
            self.forward_metadata = self._builder.decode(forward_batch)
        elif forward_batch.forward_mode.is_target_verify():
            self.forward_metadata = self._builder.verify(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Do nothing: a captured step makes its tensors inside the graph."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return the length of padding rows, whose new tokens alone stand on the padding page.

        A decode step's new token is part of the length, tokens to be verified are not.
        """
        return 0 if self._draft_tokens else 1

    @property
    def verify_mask(self) -> Any:
        """Return the mask that SGLang writes and nobody reads: a chain needs none. None without drafts."""
        return self._verify_mask

    def update_verify_buffers_to_fill_after_draft(self, spec_info: Any, cuda_graph_bs: int | None) -> None:
        """Do nothing: no description of a step depends on which tokens were drafted."""

    def forward_decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch,
        save_kv_cache: bool = True, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Attend one row a request. Graph-safe: yes."""
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, kwargs)

    def forward_extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch,
        save_kv_cache: bool = True, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Attend a chunk, a mixed batch of chunks and single rows, or rows to be verified.

        Graph-safe: yes for rows to be verified.
        """
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, kwargs)

    def _forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
        extras: dict[str, Any],
    ) -> torch.Tensor:
        sinks = extras.pop("sinks", None)
        compat.require_plain_attention(layer, k, save_kv_cache, extras)
        q = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        out = attention(
            q,
            k.view(-1, layer.tp_k_head_num, layer.head_dim),
            v.view(-1, layer.tp_v_head_num, layer.head_dim),
            self._layers[layer.layer_id],
            self.forward_metadata,
            layer.scaling,
            layer.logit_cap,
            compat.given_output(forward_batch, q.shape),
            sinks,
        )
        return out.view(-1, layer.tp_q_head_num * layer.head_dim)
