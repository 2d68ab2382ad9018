"""Requests that are asked with drafts and without."""

from __future__ import annotations

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
