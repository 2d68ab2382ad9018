"""LayeredAttentionBackend: tiles in layers that attend to all tokens, SGLang's own attention in those with a window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

if TYPE_CHECKING:
    import torch
    from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    from kvarn.sglang_backend.backend import TileAttentionBackend


class LayeredAttentionBackend(AttentionBackend):
    """Two backends, of which every layer has one.

    Args:
        tiles: serves layers without a window.
        windows: serves layers with a window, in the model's dtype.
    """

    def __init__(self, tiles: TileAttentionBackend, windows: AttentionBackend) -> None:
        super().__init__()
        self._tiles, self._windows = tiles, windows
        self.attn_backend_list = [tiles, windows]
        self.req_to_token_pool = tiles.req_to_token_pool
        self.token_to_kv_pool = tiles.token_to_kv_pool
        self.max_context_len = tiles.max_context_len
        self.needs_cpu_seq_lens = windows.needs_cpu_seq_lens
        # What 0.5.17 doesn't have.
        self.kv_index_translator = getattr(windows, "kv_index_translator", None)
        self.extend_dummy_seqs_capped_by_req_pool = getattr(windows, "extend_dummy_seqs_capped_by_req_pool", False)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Describe a step that is not captured."""
        for backend in self.attn_backend_list:
            backend.init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Describe what a graph can't."""
        for backend in self.attn_backend_list:
            backend.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Describe a decode step. Graph-safe: yes."""
        for backend in self.attn_backend_list:
            backend.init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make what captured steps share."""
        for backend in self.attn_backend_list:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return the length of padding rows."""
        return self._tiles.get_cuda_graph_seq_len_fill_value()

    @property
    def verify_mask(self) -> Any:
        """Return the mask that SGLang writes for drafts; only attention to windows may read it."""
        return self._windows.verify_mask

    def update_verify_buffers_to_fill_after_draft(self, spec_info: Any, cuda_graph_bs: int | None) -> None:
        """Redo what attention to windows describes by its mask."""
        self._windows.update_verify_buffers_to_fill_after_draft(spec_info, cuda_graph_bs)

    def on_after_cuda_graph_warmup(self) -> None:
        """Undo what a warm-up changed."""
        for backend in self.attn_backend_list:
            backend.on_after_cuda_graph_warmup()

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        """Return where the later of the two has read all that the scheduler shares."""
        ends = [backend.shared_read_ends(fm) for backend in self.attn_backend_list]
        return max(ends, key=lambda end: end.value)

    def forward_decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch,
        save_kv_cache: bool = True, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Attend one row a request. Graph-safe: yes."""
        return self._of(layer).forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch,
        save_kv_cache: bool = True, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Attend a chunk, or a mixed batch of chunks and single rows."""
        return self._of(layer).forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def _of(self, layer: RadixAttention) -> AttentionBackend:
        return self._windows if layer.sliding_window_size > 0 else self._tiles
