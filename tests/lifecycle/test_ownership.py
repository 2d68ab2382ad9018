"""When a request may take a ring for its own: owner, length, page and its writer must all be the ring's."""

from collections.abc import Callable

import pytest
import torch
from lifecycle_engine import Request
from lifecycle_faults import FORGETS
from lifecycle_oracle import Violation
from lifecycle_world import SETTINGS, TILE, World

from kvarn.core.tail import owner_tags

ONE, TWO, NEXT = [1] * TILE, [2] * TILE, [9]


def started(world: World, *requests: tuple[str, list[int]]) -> list[Request]:
    """Submit requests and give them rows, nothing computed yet."""
    new = [world.engine.submit(rid, tokens) for rid, tokens in requests]
    assert all(world.admit(request) for request in new)
    return new


def hit(world: World, rid: str, tokens: list[int], tiles: int) -> None:
    """Start a request that hits so many tiles and compute one token of it."""
    (request,) = started(world, (rid, tokens))
    assert request.computed == tiles * TILE
    world.chunk([(request, 1)])


def another_request_in_the_row(world: World) -> None:
    """Row, length and page are the ring's; the request is not."""
    (first,) = started(world, ("first", ONE + NEXT))
    row = first.row
    world.chunk([(first, TILE)])
    world.finish(first)
    hit(world, "second", ONE + NEXT, 1)
    assert world.engine.running[0].row == row


def a_tile_that_another_request_completed(world: World) -> None:
    """Request, row and page are the ring's, but the request was retracted inside the tile and finds it whole."""
    other, first = started(world, ("other", ONE + TWO + NEXT), ("first", ONE + TWO + NEXT))
    row = first.row
    world.chunk([(other, TILE)])
    world.chunk([(first, TILE + 6)])
    open_page = world.engine.table[row][1]
    world.retract(first)
    world.chunk([(other, TILE)])
    assert world.engine.table[other.row][1] == open_page
    assert world.admit(first)
    assert (first.row, first.computed) == (row, 2 * TILE)
    world.chunk([(first, 1)])


def another_sequence_under_the_same_id(world: World) -> None:
    """Request id, row and length are the ring's; the page holds other tokens."""
    other, first = started(world, ("other", TWO + NEXT), ("first", ONE + NEXT))
    world.chunk([(other, TILE)])
    world.chunk([(first, TILE)])
    world.abort(first)
    hit(world, "first", TWO + NEXT, 1)


def a_page_that_was_rewritten(world: World) -> None:
    """Request id, row, length and page are the ring's; the page went to another sequence, sent under the old id."""
    other, first = started(world, ("other", TWO + NEXT), ("first", ONE + NEXT))
    world.chunk([(first, TILE)])
    world.abort(first)
    world.engine.evict(1)
    world.chunk([(other, TILE)])
    hit(world, "first", TWO + NEXT, 1)


SCENARIOS: dict[str, Callable[[World], None]] = {
    "owner": another_request_in_the_row,
    "length": a_tile_that_another_request_completed,
    "page": another_sequence_under_the_same_id,
    "writer": a_page_that_was_rewritten,
}


@pytest.mark.parametrize("compared", SCENARIOS)
def test_ring_of_a_row_is_not_taken_for_ones_own(compared: str) -> None:
    world = World(SETTINGS["tail-64-sinks-4"])
    SCENARIOS[compared](world)
    world.check()


@pytest.mark.parametrize("compared", SCENARIOS)
def test_it_would_be_without_the_comparison(compared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FORGETS[compared](monkeypatch)
    with pytest.raises(Violation, match="in its ring"):
        SCENARIOS[compared](World(SETTINGS["tail-64-sinks-4"]))


def test_prefill_that_goes_on_keeps_its_exact_tail() -> None:
    world = World(SETTINGS["tail-64-sinks-4"])
    (request,) = started(world, ("first", ONE + TWO + NEXT))
    for length in (TILE - 1, 1, TILE, 1):
        world.chunk([(request, length)])
        assert int(world.state.own_start[request.row]) == 0


@pytest.mark.parametrize("half", [0, 1])
def test_owners_are_compared_in_all_their_bits(half: int) -> None:
    world = World(SETTINGS["tail-64-sinks-4"])
    (request,) = started(world, ("first", ONE + TWO + NEXT))
    world.chunk([(request, 70)])
    rows, prefix, length = (torch.tensor([n], dtype=torch.int32) for n in (request.row, 70, 71))
    table = torch.tensor([world.engine.table[request.row]], dtype=torch.int32)
    tags = owner_tags(["first"])
    tags[0, half] ^= 1
    _, continued = world.state.begin(rows, prefix, length, table, tags)
    assert continued.tolist() == [False]
    assert int(world.state.faults) == 1


def test_a_forgotten_ring_is_taken_over_though_nothing_else_changed() -> None:
    """An engine that lends a ring's memory to others in between says so at the next admission."""
    world = World(SETTINGS["tail-64-sinks-4"])
    (request,) = started(world, ("first", ONE + TWO + NEXT))
    world.chunk([(request, 2 * TILE)])
    row = torch.tensor([request.row], dtype=torch.int32)
    prefix, length = row.new_tensor([2 * TILE]), row.new_tensor([2 * TILE + 1])
    table = row.new_tensor([world.engine.table[request.row]])
    _, continued = world.state.begin(row, prefix, length, table)
    assert continued.tolist() == [True]
    world.state.begin(row, row.new_tensor([0]), prefix, table)
    world.state.forget(row.long())
    own_start, continued = world.state.begin(row, prefix, length, table)
    assert continued.tolist() == [False]
    assert own_start.tolist() == [2 * TILE]
    assert int(world.state.faults) == 0
