"""MethodCache: transformers' cache with tiles changed by a `Method`, read by KVarN's rule."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kvarn.evaluation.methods import TILE, Method


class MethodCache(Cache):
    """Keeps rows exact and hands out what a method would restore of those that a query reads from tiles.

    Text is fed in whole tiles: then all queries of a forward pass read the same positions from tiles.

    Args:
        methods: what happens to tiles, in every layer of the model.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        super().__init__(layers=[_MethodLayer(method) for method in methods])

    def resume(self) -> int:
        """Begin a new request that hits what is cached in whole tiles, and reads all of it from tiles.

        Returns:
            Tokens that are cached; feed those that follow.
        """
        cached = self.get_seq_length() // TILE * TILE
        for layer in self.layers:
            layer.resume(cached)
        return cached


class _MethodLayer(DynamicLayer):
    def __init__(self, method: Method) -> None:
        super().__init__()
        self._method = method
        self._own_start = 0
        self._restored: list[tuple[torch.Tensor, torch.Tensor]] = []

    def resume(self, cached: int) -> None:
        """Drop the rows that fill no tile; those before were written by another request."""
        self.keys, self.values = self.keys[..., :cached, :], self.values[..., :cached, :]
        self._own_start = cached

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows; return K and V as the new queries read them."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        tokens = key_states.shape[-2]
        if tokens > TILE:
            raise ValueError(f"A method is evaluated in chunks of at most {TILE} tokens, not {tokens}.")
        first_query = keys.shape[-2] - tokens
        if first_query % TILE:
            raise ValueError(f"A chunk starts at token {first_query}, which is no multiple of {TILE}.")
        ended = max(self._own_start, first_query - self._method.tail_tokens) // TILE
        for tile in range(len(self._restored), ended):
            at = slice(tile * TILE, (tile + 1) * TILE)
            pair = self._method.restore(keys[..., at, :].float(), values[..., at, :].float())
            self._restored.append((pair[0].to(keys.dtype), pair[1].to(values.dtype)))
        sinks = self._method.sink_tokens
        read = []
        for which, exact in enumerate((keys, values)):
            tiles = [pair[which] for pair in self._restored]
            mixed = torch.cat([*tiles, exact[..., ended * TILE :, :]], dim=-2)
            mixed[..., :sinks, :] = exact[..., :sinks, :]
            read.append(mixed)
        return read[0], read[1]
