"""LatentTileBackend: SGLang's multi-head latent attention (MLA) over the tile cache.

Steps of long chunks attend to keys and values of all heads, which are made from latents; others with absorbed weights.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from kvarn.core.latent.attend import latent_shape
from kvarn.core.latent.attention import expanded_attention, latent_attention
from kvarn.core.latent.expand import ExpandedHeads
from kvarn.core.latent.rows import LatentRows, split_rows
from kvarn.core.latent.warm_up import warm_up_latents
from kvarn.core.prefill_plan import plan_prefill
from kvarn.sglang_backend import compat
from kvarn.sglang_backend.backend import TileAttentionBackend
from kvarn.sglang_backend.metadata import StepBuilder

if TYPE_CHECKING:
    import torch
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from kvarn.sglang_backend.pool import TilePool


class LatentTileBackend(TileAttentionBackend):
    """Attention over latent records, exact tails and sinks."""

    def _make_builder(self, pool: TilePool, q_heads: int, runner: ModelRunner) -> StepBuilder:
        config, tails = pool.state.config, pool.layers[0].tails
        widths = compat.expanded_widths(runner)
        self._heads = ExpandedHeads(q_heads, *(widths or (config.layout.rope_dim, 0)))
        self._rows: LatentRows | None = None
        flash = widths and self._heads.flash(config, tails, compat.flash_attention(tails.device))
        warm_up_latents(pool.layers[0], self._heads, flash)
        numbers = self._heads.token_numbers(config.layout)
        plan = partial(
            plan_prefill, config, flash, tails.dtype, device=tails.device, token_numbers=numbers, together=True
        )
        table = runner.req_to_token_pool.req_to_token
        group, widest = latent_shape(config.layout, q_heads, tails.device)
        return StepBuilder(pool.state, pool.layers, table, group, plan, widest=widest)

    def expands(self) -> bool:
        """Tell whether the present step attends to keys and values of all heads."""
        return self.forward_metadata is not None and self.forward_metadata.plan is not None

    def prepare_prefill_qkv(
        self, *, q: torch.Tensor, q_pe: torch.Tensor, kv_a: torch.Tensor, k_pe: torch.Tensor, positions: torch.Tensor,
        layer: Any, forward_batch: Any,
    ) -> tuple[torch.Tensor, None, None]:  # fmt: skip
        """Turn queries by their positions, and keep a step's rows for the attention of the same layer, which follows.

        SGLang asks for it in place of storing rows and expanding them, where a step attends to expanded ones.
        """
        del forward_batch
        self._rows = LatentRows(kv_a, compat.turn(layer, positions, q, q_pe, k_pe).flatten(1))
        return q, None, None

    def _forward(
        self, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, layer: RadixAttention,
        forward_batch: ForwardBatch, save_kv_cache: bool, extras: dict[str, Any],
    ) -> torch.Tensor:  # fmt: skip
        tiles, step = self._layers[layer.layer_id], self.forward_metadata
        kept, self._rows = self._rows, None
        compat.require_plain_attention(layer, k if kept is None else kept, save_kv_cache or kept is not None, extras)
        if kept is None:
            layout = tiles.config.layout
            queries = split_rows(q.view(-1, layer.tp_q_head_num, layout.row_dim), layout)
            rows = split_rows(k.view(-1, layout.row_dim), layout)
            return latent_attention(*queries, rows, tiles, step, layer.scaling).flatten(1)
        rows = LatentRows(*(part[: q.shape[0]] for part in kept))
        out = expanded_attention(
            q, rows, tiles, step, step.plan, self._heads, lambda x: layer.kv_b_proj(x)[0], layer.scaling
        )
        return out.flatten(1)
