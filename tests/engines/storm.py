"""Many requests over few prompts that share beginnings, a good part of them aborted."""

from __future__ import annotations

import random
from dataclasses import replace

from plan import Request, Results, Step, alone
from tiny_models import prompt

REQUESTS = 60
ABORTED = 18
NEW_TOKENS = 12
# Long enough that no machine finishes one before its abort arrives.
ABORTED_NEW_TOKENS = 400
_LATEST_ABORT_S = 2.0
# One seed, so that each is a prefix of the next: hits on pages whose owners are being aborted.
LENGTHS = (70, 140, 270, 400)


def references() -> list[Step]:
    """Return the steps that ask each prompt by itself."""
    return [alone(Request(f"storm/alone/{n}", prompt(n, 20), NEW_TOKENS)) for n in LENGTHS]


def storm(seed: int) -> Step:
    """Return all requests, sent at once. Aborts hit the queue, chunks of a prompt, and decoding."""
    dice = random.Random(seed)
    requests = []
    for i in range(REQUESTS):
        n = dice.choice(LENGTHS)
        requests.append(Request(f"storm/{i}/{n}", prompt(n, 20), dice.randint(2, NEW_TOKENS)))
    for i in dice.sample(range(REQUESTS), ABORTED):
        long = replace(requests[i], new_tokens=ABORTED_NEW_TOKENS)
        if dice.random() < 0.5:
            requests[i] = replace(long, abort_after_s=dice.uniform(0.0, _LATEST_ABORT_S))
        else:
            requests[i] = replace(long, abort_at_token=dice.randint(1, 20))
    return Step(requests)


def survivors(results: Results) -> list[tuple[str, str]]:
    """Return the names of every request that was not aborted and of its reference."""
    names = [name.split("/") for name in results.answers if name.startswith("storm/")]
    return [
        ("/".join(parts), f"storm/alone/{parts[2]}")
        for parts in names
        if parts[1] != "alone" and results["/".join(parts)].finish == "length"
    ]
