"""Requests that are asked with drafts and without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from plan import Request, Results, Step, alone, flush
from tiny_models import prompt

TILE = 128
DRAFTS = 4
# All go over the end of a tile.
TOGETHER = [
    Request("drafts/repeats", [7, 8, 9, 10, 11, 12, 13] * 34, 60),
    Request("drafts/short", prompt(122, 60), 22),
    Request("drafts/even", prompt(123, 61), 17),
]
FIRST = TOGETHER[0]
# Sent while the first still drafts, and after it.
SECOND = Request("drafts/second", [*FIRST.tokens[: TILE + 9], 5, 6], 8)
AGAIN = Request("drafts/again", [5, 6], 12, follows=FIRST.name)
_ABORTED = Request("drafts/aborted", prompt(140, 62), 300, abort_at_token=7)


def without_drafts() -> list[Step]:
    """Return the steps that ask every request by itself, from an empty cache."""
    requests = [*TOGETHER, AGAIN, SECOND]
    return [step for request in requests for step in (alone(request), flush())]


def with_drafts() -> list[Step]:
    """Return the steps that ask them together, beside one that is aborted, and the last over what drafts left."""
    second = replace(SECOND, starts_after=(FIRST.name, 3 * DRAFTS))
    return [Step([*TOGETHER, second, _ABORTED]), alone(AGAIN), flush()]


def whole_sequences(found: Results) -> list[list[int]]:
    """Return prompt and answer of every request."""
    return [found[request.name].prompt + found[request.name].output_ids for request in (*TOGETHER, AGAIN, SECOND)]


def verified(results: Results) -> Iterator[tuple[str, int]]:
    """Yield name and committed length of every request of every step that verified drafts."""
    for chunk in results.chunks:
        if chunk.drafts:
            yield from zip(chunk.rids, chunk.prefix_lens, strict=True)


def moves(results: Results) -> Iterator[tuple[int, int]]:
    """Yield a request's committed length before and after every step that verified drafts, but for its last."""
    before: dict[str, int] = {}
    for name, prefix in verified(results):
        if name in before:
            yield before[name], prefix
        before[name] = prefix


def accepted(results: Results) -> Counter[int]:
    """Count steps by the tokens that they added to a request, the certain one included."""
    return Counter(after - before for before, after in moves(results))
