"""Drafts that know the answers: a corpus of n-grams in place of SGLang's, and corrections to what a model drafts.

SGLang's corpus is compiled when it is first used; models of random weights draft little that is right.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

_WRONG = 3


class KnowingCorpus:
    """Proposes trees as SGLang's corpus does, parents before children and padding below the root.

    Some of a request's drafts are right, then come wrong ones, padding, or none; half of the time another token stands
    beside the first.

    Args:
        known: whole sequences.
        draft_token_num: tokens of a tree, the certain one included.
    """

    def __init__(self, known: list[list[int]], *, draft_token_num: int, **_: Any) -> None:
        self._known = known
        self._size = draft_token_num
        self._random = random.Random(0)

    def match_stateful(
        self, state_ids: list[int], batch_tokens: list[list[int]], total_lens: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return trees for requests that end in some tokens and have a length: [requests * n], [requests * n * n]."""
        trees = [self._tree(tail, length) for tail, length in zip(batch_tokens, total_lens, strict=True)]
        tokens, parents = (np.array(part) for part in zip(*trees, strict=True))
        mask = np.zeros((len(state_ids), self._size, self._size), dtype=np.int64)
        for tree, above in zip(mask, parents, strict=True):
            for i, parent in enumerate(above):
                tree[i] = tree[parent] if i else 0
                tree[i, i] = 1
        return tokens.reshape(-1), mask.reshape(-1)

    def _tree(self, tail: list[int], length: int) -> tuple[list[int], list[int]]:
        """Return a tree's tokens and the parent of each."""
        after = _after(self._known, tail, length)
        chain = after[: self._random.randrange(self._size)]
        chain += [_WRONG] * self._random.randrange(self._size - len(chain))
        sibling = [_WRONG] * (self._random.random() < 0.5 and 0 < len(chain) < self._size - 1)
        tokens = [tail[-1], *sibling, *chain]
        parents = [0, *([0] * len(sibling)), *([0, *range(1 + len(sibling), len(tokens) - 1)] if chain else [])]
        padding = [0] * (self._size - len(tokens))
        return tokens + padding, parents + padding

    def insert(self, batch_tokens: list[list[int]]) -> None:
        """Learn nothing."""

    def synchronize(self) -> None:
        """Wait for nothing."""

    def reset(self) -> None:
        """Forget nothing."""

    def erase_states(self, state_ids: list[int]) -> None:
        """Forget nothing."""


def correct_drafts(known: list[list[int]]) -> None:
    """Let some drafts of every model be right: as many of a request's as chance has it.

    Args:
        known: whole sequences.
    """
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

    draft, pick = EagleDraftWorker.draft, random.Random(0)

    def corrected(self: Any, batch: Any, **options: Any) -> Any:
        found = draft(self, batch, **options)
        for request, tokens in zip(batch.reqs, found.draft_token.view(len(batch.reqs), -1), strict=True):
            seen = [*request.origin_input_ids, *request.output_ids]
            if seen[-1] != tokens[0]:
                raise RuntimeError(f"{request.rid} ends in {seen[-1]}, but drafts follow {int(tokens[0])}")
            right = _after(known, seen, len(seen))[: pick.randrange(len(tokens))]
            tokens[1 : 1 + len(right)] = tokens.new_tensor(right)
        return found

    EagleDraftWorker.draft = corrected


def _after(known: list[list[int]], tail: list[int], length: int) -> list[int]:
    """Return how the known sequence goes on that ends in a tail at a length; nothing if there is none."""
    return next((seen[length:] for seen in known if seen[length - len(tail) : length] == tail), [])
