"""Feed a text to a model with one cache or another, and compare what it predicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache

from kvarn import hf
from kvarn.checkpoint import describe
from kvarn.core.layers import LayerKind
from kvarn.core.layout import TileLayout
from kvarn.evaluation.divergence import Divergence, divergence
from kvarn.evaluation.generate import EXACT, greedy
from kvarn.evaluation.method_cache import MethodCache
from kvarn.evaluation.methods import TILE, UNCHANGED, Method, methods
from kvarn.evaluation.names import is_variant_name
from kvarn.evaluation.variants import variant
from kvarn.presets import get_preset, is_preset_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Shows how far an iteration is: takes what to go through and a label, gives it back.
Progress = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class _Pass:
    """Tokens begin to end of one forward pass; the first `again` of them were fed in an earlier turn already."""

    begin: int
    end: int
    again: int
    resumes: bool


class Evaluation:
    """One model and text; the exact predictions are made once.

    Args:
        model: in evaluation mode; its attention implementation is switched to and fro.
        ids: [tokens], the text.
        progress: wraps the chunks of a pass.
        turns: first token of every turn. A turn is a request of its own: what is cached of earlier ones in whole tiles
            it reads from tiles, however new.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: torch.Tensor,
        progress: Progress = lambda parts, _: parts,
        turns: Sequence[int] = (0,),
    ) -> None:
        self._model = model
        self._ids = ids.to(model.device)
        self._turns = list(turns)
        self._progress = progress
        self._exact: torch.Tensor | None = None

    def row(self, name: str) -> dict[str, Any]:
        """Return the figures of a preset or method, flat.

        Args:
            name: of a preset, or of one of `methods`.

        Raises:
            UnknownPreset: it is neither.
            UnsupportedConfig: the model can't be served with tiles.
        """
        found = dataclasses.asdict(self.compare(self._cache(name), name))
        quarters, by_turn = found.pop("kl_quarters"), found.pop("kl_turns")
        found |= {f"kl_quarter_{i}": value for i, value in enumerate(quarters, 1)}
        if len(by_turn) > 1:
            found |= {f"kl_turn_{i}": value for i, value in enumerate(by_turn, 1)}
        rounded = {key: float(f"{value:.6g}") for key, value in found.items()}
        bytes_each = round(bytes_per_token_head(name, self._model), 2)
        return {"method": name, "bytes_per_token_head": bytes_each, "tokens": len(self._ids), **rounded}

    def compare(self, cache: hf.TileCache | MethodCache, label: str) -> Divergence:
        """Return what an empty cache changes about the predictions.

        Args:
            cache: for the text's length.
            label: for the progress bar.
        """
        if self._exact is None:
            self._exact = self._states(DynamicCache(), EXACT)
        return divergence(self._head, self._exact, self._states(cache, label), self._ids, self._turns)

    @torch.no_grad()
    def _states(self, cache: Cache, label: str) -> torch.Tensor:
        """Return the final hidden states of the text, [tokens, hidden], fed in chunks of one tile."""
        self._model.set_attn_implementation(hf.ATTENTION if isinstance(cache, hf.TileCache) else "sdpa")
        passes = self._passes(resumes=isinstance(cache, hf.TileCache | MethodCache))
        states = []
        for one in self._progress(passes, label):
            if one.resumes:
                cache.resume()
            chunk = self._ids[None, one.begin : one.end]
            states.append(self._model.base_model(chunk, past_key_values=cache).last_hidden_state[0, one.again :])
        return torch.cat(states)

    def _passes(self, *, resumes: bool) -> list[_Pass]:
        """Return what to feed; a turn of a request of its own begins with the tile that its first token stands in."""
        passes = []
        for start, end in zip(self._turns, [*self._turns[1:], len(self._ids)], strict=True):
            first = start // TILE * TILE if resumes else start
            for begin in range(first, end, TILE):
                new = resumes and begin == first and start > 0
                passes.append(_Pass(begin, min(begin + TILE, end), max(0, start - begin), new))
        return passes

    def _cache(self, name: str) -> hf.TileCache | MethodCache:
        if is_preset_name(name):
            self._model.set_attn_implementation(hf.ATTENTION)
            return hf.TileCache(self._model, name, max_tokens=-(-len(self._ids) // TILE) * TILE)
        kinds, method = describe(self._model.config.to_dict()).layers, _method(name)
        return MethodCache([method if kind is LayerKind.TILES else UNCHANGED for kind in kinds])

    def _head(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model.get_output_embeddings()(states)
        cap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits


def check_name(name: str) -> None:
    """Raise UnknownPreset if a name is neither a preset nor a method, KVarNError if it is a wrong variant's."""
    if is_variant_name(name):
        variant(name)
    elif name not in methods():
        get_preset(name)


def _method(name: str) -> Method:
    return variant(name) if is_variant_name(name) else methods()[name]


def bytes_per_token_head(name: str, model: PreTrainedModel) -> float:
    """Return the bytes of one token and kv head, K and V, in the records of a preset or by a method's own account."""
    head_dim = describe(model.config.to_dict()).facts.head_dim
    if not is_preset_name(name):
        return _method(name).bytes_per_token_head(head_dim)
    layout = TileLayout.of(get_preset(name), head_dim)
    return layout.record_bytes / layout.tile_tokens


def first_divergences(model: PreTrainedModel, name: str, prompts: list[torch.Tensor], new_tokens: int) -> list[int]:
    """Generate greedily with a preset's cache and without; return how many tokens are equal before the first is not.

    Args:
        model: in evaluation mode.
        name: of a preset.
        prompts: token ids, [tokens] each.
        new_tokens: generated for each prompt.
    """
    asked = [prompt.tolist() for prompt in prompts]
    answers = [greedy(model, dtype, asked, new_tokens) for dtype in (EXACT, name)]
    pairs = zip(*answers, strict=True)
    return [next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), new_tokens) for a, b in pairs]
