"""How vLLM accounts for the exact tails: a few blocks a request, held from its admission to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_interface import CircularBufferSpec

from kvarn.vllm_backend import compat

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.kv_cache_interface import KVCacheSpec


@dataclass(frozen=True, kw_only=True)
class TailSpec(CircularBufferSpec):
    """One cache "layer" that stands for the tail rings of all layers.

    vLLM's own ring spec takes one block a request and layer, which makes a group of layers of every few rings. One
    group whose requests hold several blocks costs the scheduler a single manager instead.

    Args:
        blocks_per_request: blocks that hold one request's rings.
    """

    blocks_per_request: int

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Return the bytes of one request's rings."""
        del vllm_config
        return self.blocks_per_request * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Return the width of the group's block table."""
        del vllm_config, max_len
        return self.blocks_per_request

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Tell whether all specs are tails."""
        return all(isinstance(spec, TailSpec) for spec in kv_cache_specs.values())


class TailManager(CircularBufferManager):
    """Claims a request's tail blocks at its admission; the base class frees them with the request."""

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> int:
        """Return how many blocks the request still needs."""
        return 0 if self.req_to_blocks.get(request_id) else self._blocks_per_request

    @property
    def _blocks_per_request(self) -> int:
        spec = getattr(self.kv_cache_spec, "first_spec", self.kv_cache_spec)
        return int(spec.blocks_per_request)

    def allocate_new_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        """Claim the request's blocks; nothing if it has them."""
        held = self.req_to_blocks[request_id]
        if held:
            return []
        blocks: list[KVCacheBlock] = self.block_pool.get_new_blocks(self._blocks_per_request)
        held.extend(blocks)
        return blocks

    def allocate_external_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        """Claim the blocks of a request whose first tokens come from elsewhere."""
        self.allocate_new_blocks(request_id)


compat.register_spec(TailSpec, TailManager)
