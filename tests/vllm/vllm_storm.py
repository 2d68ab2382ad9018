"""Many requests over few prompts that share beginnings, a good part of them aborted at fixed steps and tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from plan import Answer, Request
from serving import Serving
from tiny_models import prompt

REQUESTS = 60
ABORTED = 18
NEW_TOKENS = 24
# Long enough that none is finished when it is to be aborted.
_ABORTED_NEW_TOKENS = 400
_LATEST_STEP = 60
_LATEST_TOKEN = 20
# In one family each is a prefix of the next: hits on blocks whose owners are being aborted. Answers cross tiles.
LENGTHS = (70, 120, 250, 380)
FAMILIES = (20, 21, 22)


@dataclass(frozen=True, slots=True)
class Storm:
    """Requests that are sent at once, and the step before which some of them are aborted."""

    requests: list[Request]
    abort_steps: dict[str, int]


@dataclass(frozen=True, slots=True)
class Ended:
    """What was left of a storm.

    Args:
        answers: by request name.
        computed: tokens of each request that were computed or hit when it ended; 0 if it was never scheduled.
        preempted: requests that lost their blocks.
    """

    answers: dict[str, Answer]
    computed: dict[str, int]
    preempted: set[str]

    @property
    def survivors(self) -> list[Answer]:
        """Answers that nobody aborted."""
        return [answer for answer in self.answers.values() if answer.finish == "length"]

    @property
    def aborted(self) -> dict[str, Answer]:
        """The others, by name."""
        return {name: answer for name, answer in self.answers.items() if answer.finish == "abort"}


def make_storm(seed: int) -> Storm:
    """Return requests of which half the aborts come at a step and half at a token."""
    dice = random.Random(seed)
    requests = []
    for i in range(REQUESTS):
        tokens = prompt(dice.choice(LENGTHS), dice.choice(FAMILIES))
        requests.append(Request(f"storm/{i}", tokens, dice.randint(2, NEW_TOKENS)))
    abort_steps = {}
    for i in dice.sample(range(REQUESTS), ABORTED):
        requests[i] = replace(requests[i], new_tokens=_ABORTED_NEW_TOKENS)
        if dice.random() < 0.5:
            abort_steps[requests[i].name] = dice.randint(0, _LATEST_STEP)
        else:
            requests[i] = replace(requests[i], abort_at_token=dice.randint(1, _LATEST_TOKEN))
    return Storm(requests, abort_steps)


def weather(engine: Serving, storm: Storm) -> Ended:
    """Carry out a storm."""
    before = len(engine.steps)
    answers = engine.ask(*storm.requests, abort_steps=storm.abort_steps)
    computed = dict.fromkeys(answers, 0)
    for step in engine.steps[before:]:
        computed |= {name: step.prefix_lens[name] + count for name, count in step.query_lens.items()}
    return Ended(answers, computed, {name for step in engine.steps[before:] for name in step.preempted})
