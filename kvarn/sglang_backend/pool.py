"""TilePool: SGLang's token pool with pages of records instead of rows of K and V."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from kvarn.core.cache import CacheConfig, LayerCache, allocate_layer, layer_bytes
from kvarn.core.table_pool import PoolSettings
from kvarn.core.tail import TailState


class TilePool(MHATokenToKVPool):
    """Owns the records, tails and sinks of all layers of this rank.

    SGLang's allocator hands out pages of it as of any paged pool; a page is one tile of every kv head. Rows of K and V
    are written by the attention backend, through the core, never by this class.
    """

    settings: ClassVar[PoolSettings]
    layers: list[LayerCache]
    state: TailState

    def _create_buffers(self) -> None:
        settings = self.settings
        config = CacheConfig.of(settings.shape)
        pages = self.size // self.page_size + 1
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            self.layers = [
                allocate_layer(config, pages, settings.num_rows, settings.sink_slots, settings.raw_dtype, self.device)
                for _ in range(self.layer_num)
            ]
            self.state = TailState(config, settings.num_rows, pages, settings.sink_slots, self.device)
        self.k_buffer: list[torch.Tensor] = []
        self.v_buffer: list[torch.Tensor] = []

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Return the bytes that keys and values take, tails and sinks included."""
        sizes = [layer_bytes(layer) for layer in self.layers]
        return sum(k for k, _ in sizes), sum(v for _, v in sizes)

    def _clear_buffers(self) -> None:
        del self.layers, self.state

    def _init_kv_copy_and_warmup(self) -> None:
        self._kv_copy_config = None

    def set_kv_buffer(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse: rows reach the cache through the attention backend only."""
        raise NotImplementedError(
            "KVarN writes K and V in its attention backend; set_kv_buffer has no rows to write to."
        )

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Do nothing: accepted tokens of a chain of drafts stand where they belong.

        A token that does not, as in a tree, is counted as a fault, which stops the server at its next chunk: a
        quantised tile can't be moved token by token. Graph-safe: yes.
        """
        self.state.faults += (tgt_loc != src_loc).any()

    def get_kv_buffer(self, layer_id: int) -> NoReturn:
        """Refuse, for keys and values together and alone: there are no rows of them."""
        raise NotImplementedError(
            f"Layer {layer_id} is stored as KVarN records and has no rows of K and V to hand out. "
            "The feature that asked for them can't be used with a kvarn cache dtype."
        )

    get_key_buffer = get_value_buffer = get_kv_buffer
