"""What a driver is asked to do with one engine, and what it answers. Both travel as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Request:
    """One generation, greedy and past any end token.

    Args:
        name: its name in the answers; unique in a plan.
        tokens: prompt, or what is appended to the conversation that it follows.
        new_tokens: tokens to generate.
        follows: name of an earlier request, whose prompt and answer come before `tokens`.
        starts_after: name of a request of the same group and how many tokens it must have before this one is sent.
        abort_at_token: abort once that many tokens have come back.
        abort_after_s: abort that many seconds after it was sent.
        logprobs: ask for log probabilities; SGLang mixes no decode rows into a chunk if any request of the two does.
        distribution: ask for the log probabilities of all tokens at the first place.
    """

    name: str
    tokens: list[int]
    new_tokens: int
    follows: str | None = None
    starts_after: tuple[str, int] | None = None
    abort_at_token: int | None = None
    abort_after_s: float | None = None
    logprobs: bool = True
    distribution: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """Requests that are sent together, or, with no request, a flush of the cache."""

    requests: list[Request] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for a request.

    Args:
        prompt: the whole prompt.
        output_ids: generated tokens.
        logprobs: log probability of each; empty if they were not asked for.
        cached_tokens: tokens of the prompt that came from the cache.
        finish: SGLang's reason, "length" or "abort".
        retractions: how often the request lost its pages and began again.
        distribution: log probability of every token at the first place; empty if it was not asked for.
    """

    prompt: list[int]
    output_ids: list[int]
    logprobs: list[float]
    cached_tokens: int
    finish: str
    retractions: int
    distribution: list[float]

    @property
    def bits(self) -> tuple[list[int], list[float]]:
        """What has to be equal where answers are equal bit for bit."""
        return self.output_ids, self.logprobs


@dataclass(frozen=True, slots=True)
class Chunk:
    """One forward pass over chunks or drafts: parallel lists, one entry a request; and what all have in common.

    Args:
        prefix_lens: tokens before the pass.
        seq_lens: tokens after it.
        own_start: first position that the request wrote itself.
        rows: its ring.
        rids: its name.
        drafts: of each request.
        restored: most cached keys that long chunks attend to in one call; None if no chunk is long.
    """

    prefix_lens: list[int]
    seq_lens: list[int]
    own_start: list[int]
    rows: list[int]
    rids: list[str]
    drafts: int
    restored: int | None


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that a driver learnt.

    Args:
        answers: by request name.
        flushed: whether each flush succeeded; SGLang refuses one while it holds requests.
        chunks: forward passes over chunks or drafts, in order.
        log: the engine's standard output and error.
    """

    answers: dict[str, Answer]
    flushed: list[bool]
    chunks: list[Chunk]
    log: str

    def __getitem__(self, name: str) -> Answer:
        return self.answers[name]


def flush() -> Step:
    """Return the step that empties the cache."""
    return Step()


def alone(request: Request) -> Step:
    """Return the step that sends one request by itself."""
    return Step([request])


def write_plan(path: Path, engine: dict[str, Any], steps: list[Step]) -> None:
    """Write what a driver reads."""
    text = json.dumps({"engine": engine, "steps": [asdict(step) for step in steps]})
    # Two workers of pytest-xdist may write the same plan while a driver reads it.
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def read_plan(path: Path) -> tuple[dict[str, Any], list[Step]]:
    """Read what `write_plan` wrote."""
    plan = json.loads(path.read_text())
    return plan["engine"], [Step([Request(**request) for request in step["requests"]]) for step in plan["steps"]]
