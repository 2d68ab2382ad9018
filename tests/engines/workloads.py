"""Plans that several tests ask an engine to run."""

from __future__ import annotations

from collections.abc import Collection

from plan import Request, Step, alone, flush
from tiny_models import REFERENCE_LENGTHS, REFERENCE_TOKENS, prompt


def reference_prompts(hits: Collection[int]) -> list[Step]:
    """Return each prompt by itself, again where its length is in `hits`, then all at once."""
    steps = []
    for n in REFERENCE_LENGTHS:
        steps.append(alone(Request(f"{n}/cold", prompt(n, n), REFERENCE_TOKENS, distribution=True)))
        if n in hits:
            steps.append(alone(Request(f"{n}/hit", prompt(n, n), 1, distribution=True)))
        steps.append(flush())
    together = [Request(f"{n}/together", prompt(n, n), REFERENCE_TOKENS) for n in REFERENCE_LENGTHS]
    return [*steps, Step(together), flush()]


def conversation(turns: int) -> list[Request]:
    """Return requests of which each continues the one before."""
    names = [f"turn/{i}" for i in range(turns)]
    return [
        Request(name, prompt(170, 60 + i), 40, follows=names[i - 1] if i else None, distribution=True)
        for i, name in enumerate(names)
    ]


def conversation_warm_and_cold(turns: int) -> list[Step]:
    """Return a conversation in one cache, and each turn again in an empty one."""
    requests = conversation(turns)
    cold = [Request(f"{turn.name}/cold", turn.tokens, 8, turn.follows, distribution=True) for turn in requests[1:]]
    return [*map(alone, requests), *(step for turn in cold for step in (flush(), alone(turn))), flush()]
