"""The life cycle as a hypothesis state machine: what it finds, it shrinks to a few actions.

KVARN_LIFECYCLE_EXAMPLES (200) and KVARN_LIFECYCLE_ACTIONS (60) set how many schedules run and how long each is.
"""

import os
from collections import Counter
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lifecycle_engine import Request
from lifecycle_oracle import Violation
from lifecycle_world import EVENTS, MAX_TILES, SETTINGS, TILE, World, prompt

EXAMPLES = int(os.environ.get("KVARN_LIFECYCLE_EXAMPLES", "200"))
ACTIONS = int(os.environ.get("KVARN_LIFECYCLE_ACTIONS", "60"))
# With less than this many actions in all, rare events may not come up.
_ENOUGH_ACTIONS = 12000

REQUEST_IDS = st.sampled_from([f"request-{i}" for i in range(8)])
PICKS = st.integers(0, 15)
EDGES = st.integers(1, MAX_TILES - 2).map(lambda tiles: tiles * TILE)
LENGTHS = st.one_of(EDGES, EDGES.map(lambda n: n + 1), st.integers(1, (MAX_TILES - 2) * TILE))
SIZES = st.one_of(st.integers(1, 130), st.sampled_from([TILE - 1, TILE, TILE + 1]))


class LifeCycle(RuleBasedStateMachine):
    """Rules are what an engine can do; the oracle judges every forward pass."""

    totals: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.world = World(SETTINGS["tail-64-sinks-4"])
        self.past: list[Request] = []

    @initialize(name=st.sampled_from(sorted(SETTINGS)))
    def choose(self, name: str) -> None:
        self.world = World(SETTINGS[name])

    @rule(rid=REQUEST_IDS, family=st.integers(0, 1), branch=st.integers(0, 2), length=LENGTHS, greedy=st.booleans())
    def submit(self, rid: str, family: int, branch: int, length: int, greedy: bool) -> None:
        self._submit(rid, prompt(family, TILE, branch, length), greedy)

    @precondition(lambda self: self.world.prefilling)
    @rule(sizes=st.lists(SIZES, min_size=1, max_size=4), to_the_end=st.booleans())
    def prefill(self, sizes: list[int], to_the_end: bool) -> None:
        self.world.chunk(list(zip(self.world.prefilling, sizes, strict=False)))
        if to_the_end:
            self.world.chunk([(request, self.world.engine.max_tokens) for request in self.world.prefilling])

    @precondition(lambda self: self.world.prefilling and self.world.decoding)
    @rule(sizes=st.lists(SIZES, min_size=1, max_size=4), singles_first=st.booleans())
    def mixed(self, sizes: list[int], singles_first: bool) -> None:
        singles = [(request, 1) for request in self.world.decoding]
        chunks = list(zip(self.world.prefilling, sizes, strict=False))
        self.world.chunk(singles + chunks if singles_first else chunks + singles)

    @precondition(lambda self: self.world.decoding or self.world.ending)
    @rule(times=st.sampled_from([1, 1, 2, TILE - 1, TILE]), padding=st.integers(0, 2), leave_out=PICKS)
    def decode(self, times: int, padding: int, leave_out: int) -> None:
        for _ in range(times):
            requests = self.world.decoding
            self.world.decode([r for i, r in enumerate(requests) if i != leave_out], padding)

    @precondition(lambda self: self.world.decoding)
    @rule(pick=PICKS, overrun=st.booleans())
    def finish(self, pick: int, overrun: bool) -> None:
        request = self.world.decoding[pick % len(self.world.decoding)]
        self.past.append(Request(request.rid, request.tokens[: request.computed]))
        self.world.finish(request, overrun=overrun)

    @precondition(lambda self: self.past)
    @rule(rid=REQUEST_IDS, pick=PICKS, more=st.sampled_from([1, 1, 30]), same_id=st.booleans())
    def go_on(self, rid: str, pick: int, more: int, same_id: bool) -> None:
        past = self.past[pick % len(self.past)]
        tokens = past.tokens[: (MAX_TILES - 1) * TILE]
        self._submit(past.rid if same_id else rid, tokens + [5] * more, True)

    @precondition(lambda self: self.world.engine.waiting or self.world.prefilling or self.world.decoding)
    @rule(pick=PICKS, overrun=st.booleans())
    def abort(self, pick: int, overrun: bool) -> None:
        requests = [*self.world.engine.waiting, *self.world.prefilling, *self.world.decoding]
        self.world.abort(requests[pick % len(requests)], overrun=overrun)

    @precondition(lambda self: self.world.prefilling or self.world.decoding)
    @rule(pick=PICKS)
    def retract(self, pick: int) -> None:
        requests = self.world.prefilling + self.world.decoding
        self.world.retract(requests[pick % len(requests)])

    @rule(count=st.integers(1, 8))
    def evict(self, count: int) -> None:
        self.world.engine.evict(count)

    @precondition(lambda self: self.world.steps > 30)
    @rule()
    def flush(self) -> None:
        self.world.flush()

    @rule()
    def admit_again(self) -> None:
        for request in [*self.world.engine.waiting]:
            self.world.admit(request)

    @invariant()
    def nothing_leaks(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        LifeCycle.totals += self.world.counts

    def _submit(self, rid: str, tokens: list[int], greedy: bool) -> None:
        if rid not in {r.rid for r in [*self.world.engine.waiting, *self.world.engine.running]}:
            self.world.admit(self.world.engine.submit(rid, tokens, greedy=greedy))


def machine_settings(**changes: Any) -> settings:
    return settings(
        max_examples=EXAMPLES,
        stateful_step_count=ACTIONS,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        **changes,
    )


@pytest.mark.timeout(0)
def test_every_position_resolves_to_its_own_token_in_any_life_cycle() -> None:
    LifeCycle.totals.clear()
    run_state_machine_as_test(LifeCycle, settings=machine_settings())
    counted_by_the_driver_only = {"continuations in the same row", "reused ids", "ids taken over"}
    missing = {event for event in EVENTS if not LifeCycle.totals[event]} - counted_by_the_driver_only
    assert not missing or EXAMPLES * ACTIONS < _ENOUGH_ACTIONS


def test_state_machine_finds_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from lifecycle_faults import FAULTS

    FAULTS["own_start always 0"].inject(monkeypatch)
    with pytest.raises(Violation):
        run_state_machine_as_test(LifeCycle, settings=machine_settings(phases=[Phase.generate]))
