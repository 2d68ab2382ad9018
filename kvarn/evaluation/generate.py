"""Greedy generation through transformers, from an exact cache or from tiles."""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from kvarn import hf
from kvarn.presets import is_preset_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXACT = "auto"


def greedy(
    model: PreTrainedModel,
    dtype: str,
    prompts: list[list[int]],
    new_tokens: int,
    stops: Collection[int] = (),
    batch: int = 16,
) -> list[list[int]]:
    """Return what a model goes on with, always the most likely token. Prompts of one length are run together.

    Args:
        model: in evaluation mode; its attention implementation is switched to and fro.
        dtype: of the cache: a preset, or `EXACT`.
        prompts: token ids.
        new_tokens: most tokens of an answer.
        stops: tokens that end an answer; it contains them.
        batch: most prompts at a time.
    """
    answers: dict[int, list[int]] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, same in groupby(by_length, key=lambda i: len(prompts[i])):
        group = list(same)
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            ids = torch.tensor([prompts[i] for i in part], device=model.device)
            answers |= zip(part, _greedy_batch(model, dtype, ids, new_tokens, stops), strict=True)
    return [cut(answers[i], stops) for i in range(len(prompts))]


def cut(answer: list[int], stops: Collection[int]) -> list[int]:
    """Return an answer up to and including the first token that ends it."""
    end = next((i for i, token in enumerate(answer, 1) if token in stops), len(answer))
    return answer[:end]


@torch.no_grad()
def _greedy_batch(
    model: PreTrainedModel, dtype: str, ids: torch.Tensor, new_tokens: int, stops: Collection[int]
) -> list[list[int]]:
    model.set_attn_implementation(hf.ATTENTION if is_preset_name(dtype) else "sdpa")
    longest = ids.shape[1] + new_tokens
    tiles = hf.TileCache(model, dtype, longest, len(ids)) if is_preset_name(dtype) else None
    cache = DynamicCache() if tiles is None else tiles
    stop = torch.tensor(sorted(stops), dtype=torch.int64, device=ids.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    new: list[torch.Tensor] = []
    while len(new) < new_tokens and not (stops and bool(ended.all())):
        ids = model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(dim=-1)
        new.append(ids)
        ended |= torch.isin(ids[:, 0], stop)
    answers: list[list[int]] = torch.cat(new, dim=1).tolist()
    return answers
