"""LatentTileBackend: SGLang's multi-head latent attention (MLA) over the tile cache, always with absorbed weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvarn.core.latent.attend import LATENT_COLUMNS, heads_together
from kvarn.core.latent.attention import latent_attention
from kvarn.core.latent.rows import split_rows
from kvarn.core.latent.warm_up import warm_up_latents
from kvarn.sglang_backend import compat
from kvarn.sglang_backend.backend import TileAttentionBackend
from kvarn.sglang_backend.metadata import StepBuilder

if TYPE_CHECKING:
    import torch
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.model_runner import ModelRunner

    from kvarn.sglang_backend.pool import TilePool


class LatentTileBackend(TileAttentionBackend):
    """Attention over latent records, exact tails and sinks."""

    def _make_builder(self, pool: TilePool, q_heads: int, runner: ModelRunner) -> StepBuilder:
        warm_up_latents(pool.layers[0], q_heads, (0, 0), None, None)
        table = runner.req_to_token_pool.req_to_token
        return StepBuilder(pool.state, pool.layers, table, heads_together(q_heads), None, widest=LATENT_COLUMNS)

    def _forward(
        self, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, layer: RadixAttention,
        save_kv_cache: bool, extras: dict[str, Any],
    ) -> torch.Tensor:  # fmt: skip
        compat.require_plain_attention(layer, k, save_kv_cache, extras)
        layout = self._layers[layer.layer_id].config.layout
        queries = split_rows(q.view(-1, layer.tp_q_head_num, layout.row_dim), layout)
        rows = split_rows(k.view(-1, layout.row_dim), layout)
        out = latent_attention(*queries, rows, self._layers[layer.layer_id], self.forward_metadata, layer.scaling)
        return out.flatten(1)
