"""Driver: does random things to a World, seeded, with a liking for tile edges."""

import random

from lifecycle_engine import Request
from lifecycle_world import MAX_TILES, TILE, World, prompt

_REQUEST_IDS = [f"request-{i}" for i in range(12)]
_QUEUE = 3


class Driver:
    """Feeds a world with requests and moves it by one random action at a time."""

    def __init__(self, world: World, seed: int | str) -> None:
        self.world = world
        self.random = random.Random(seed)
        self._finished: list[Request] = []
        self._past_ids: set[str] = set()

    def run(self, steps: int) -> None:
        """Act until the world made that many forward passes."""
        goal = self.world.steps + steps
        while self.world.steps < goal:
            self._feed()
            if self.random.random() < 0.12:
                self._event()
                self.world.check()
                continue
            before = self.world.steps
            self.random.choices((self._decode, self._chunk, self._mixed), (60, 30, 10))[0]()
            if self.world.steps == before:
                self._make_room()

    def _event(self) -> None:
        weights = {
            self._finish: 30,
            self._continue: 30,
            self._take_over_id: 15,
            self._abort: 15,
            self._retract: 15,
            self._evict: 10,
            self._flush: 1,
        }
        self.random.choices(list(weights), list(weights.values()))[0]()

    def _feed(self) -> None:
        waiting = self.world.engine.waiting
        if len(waiting) < _QUEUE and self.random.random() < 0.4:
            tokens = self._prompt()
            self._submit(tokens)
            if self.random.random() < 0.3:
                self._submit(tokens)
        while waiting and self.random.random() < 0.5 and self.world.admit(waiting[0]):
            pass

    def _submit(self, tokens: list[int]) -> Request:
        engine = self.world.engine
        busy = {r.rid for r in [*engine.waiting, *engine.running]}
        rid = self.random.choice([rid for rid in _REQUEST_IDS if rid not in busy])
        engine.counts["reused ids"] += rid in self._past_ids
        self._past_ids.add(rid)
        return engine.submit(rid, tokens, greedy=self.random.random() < 0.7)

    def _prompt(self) -> list[int]:
        pick = self.random
        if self._finished and pick.random() < 0.4:
            past = pick.choice(self._finished[-4:])
            return past.tokens[: (MAX_TILES - 1) * TILE] + [1] * pick.choice([1, 1, 2, 30])
        edge = pick.randrange(1, MAX_TILES - 1) * TILE
        length = pick.choice([edge - 1, edge, edge + 1, edge + 2, pick.randrange(1, (MAX_TILES - 1) * TILE)])
        return prompt(pick.randrange(2), pick.choice([0, 3, TILE, 2 * TILE, 999]), pick.randrange(3), length)

    def _size(self, request: Request) -> int:
        left = len(request.tokens) - request.computed
        to_edge = TILE - request.computed % TILE
        sizes = [left, to_edge, to_edge + 1, max(1, to_edge - 1), to_edge + TILE, self.random.randrange(1, 100)]
        return self.random.choice(sizes)

    def _some(self, requests: list[Request]) -> list[Request]:
        count = len(requests) if self.random.random() < 0.6 else self.random.randrange(len(requests) + 1)
        return self.random.sample(requests, count)

    def _decode(self) -> None:
        requests, padding = self._some(self.world.decoding), self.random.choice([0, 0, 1, 3])
        drafts = self.random.randrange(self.world.config.draft_tokens + 1)
        accepted = [self.random.randrange(drafts + 1) for _ in requests]
        self.world.verify(requests, accepted, padding, drafts)

    def _chunk(self) -> None:
        self.world.chunk([(r, self._size(r)) for r in self._some(self.world.prefilling)])

    def _mixed(self) -> None:
        parts = [(r, self._size(r)) for r in self.world.prefilling] + [(r, 1) for r in self.world.decoding]
        self.random.shuffle(parts)
        self.world.chunk(parts)

    def _finish(self) -> None:
        running = self.world.decoding
        if running:
            at_edge = [r for r in running if r.computed % TILE == 0]
            request = self.random.choice(at_edge or running)
            self._finished.append(Request(request.rid, request.tokens[: request.computed]))
            self.world.finish(request, overrun=self.random.random() < 0.4)

    def _continue(self) -> None:
        """End a request at a tile edge and go on with its tokens in a new one, which gets the same row."""
        at_edge = self._at_edge()
        if at_edge:
            past = self.random.choice(at_edge)
            tokens = past.tokens[: past.computed]
            self._finished.append(Request(past.rid, tokens))
            self.world.finish(past)
            self.world.admit(self._submit(tokens + [5] * self.random.choice([1, 1, 2, 40])))

    def _take_over_id(self) -> None:
        """Abort a request at a tile edge and send another, published sequence under its id to the same row."""
        for past in self._at_edge():
            others = [r.tokens[: past.computed] for r in self._finished[-8:] if len(r.tokens) >= past.computed]
            others = [tokens for tokens in others if tokens != past.tokens[: past.computed]]
            if others:
                self.world.abort(past)
                self.world.engine.counts["ids taken over"] += 1
                self.world.admit(self.world.engine.submit(past.rid, self.random.choice(others) + [6]))
                return

    def _at_edge(self) -> list[Request]:
        running, limit = self.world.prefilling + self.world.decoding, self.world.engine.max_tokens
        return [r for r in running if r.computed % TILE == 0 and 0 < r.computed < limit]

    def _abort(self) -> None:
        requests = [*self.world.engine.waiting, *self.world.prefilling, *self.world.decoding]
        if requests:
            self.world.abort(self.random.choice(requests), overrun=self.random.random() < 0.4)

    def _retract(self) -> None:
        requests = self.world.prefilling + self.world.decoding
        if len(requests) > 1:
            self.world.retract(self.random.choice(requests))

    def _evict(self) -> None:
        self.world.engine.evict(self.random.randrange(1, 6))

    def _flush(self) -> None:
        self.world.flush()

    def _make_room(self) -> None:
        """End what reached its longest, and retract somebody where pages ran out."""
        full = [r for r in self.world.decoding if r.computed >= self.world.engine.max_tokens]
        for request in full:
            self.world.finish(request)
        if not full and self.random.random() < 0.2:
            self._retract()
