"""How answers are compared, and where what was measured goes."""

from __future__ import annotations

import math
from collections.abc import Callable

from plan import Answer

# pytest's record_property; conftest.py prints what it is given.
Record = Callable[[str, object], None]


def same_bits(one: Answer, other: Answer) -> None:
    """Assert that two answers to one prompt are equal to the last bit."""
    assert one.prompt == other.prompt
    assert one.output_ids == other.output_ids
    assert one.logprobs == other.logprobs


def logprob_difference(one: Answer, other: Answer) -> float:
    """Return the largest difference of log probabilities, up to and including the first token that differs.

    There the two chose different tokens, but greedy decoding reports the largest log probability of each, and two
    largest values differ by no more than the distributions do.
    """
    assert one.prompt == other.prompt
    largest = 0.0
    tokens = zip(one.output_ids, other.output_ids, one.logprobs, other.logprobs, strict=True)
    for token, other_token, logprob, other_logprob in tokens:
        largest = max(largest, abs(logprob - other_logprob))
        if token != other_token:
            break
    return largest


def divergence(answer: Answer, from_answer: Answer) -> float:
    """Return the Kullback-Leibler divergence of what the two say at the first place, in nats."""
    assert answer.prompt == from_answer.prompt
    pairs = zip(from_answer.distribution, answer.distribution, strict=True)
    return sum(math.exp(logprob) * (logprob - other) for logprob, other in pairs)


def is_finite(answer: Answer) -> bool:
    """Tell whether every log probability is a number that a model can mean."""
    return bool(answer.logprobs) and all(math.isfinite(logprob) and logprob <= 0 for logprob in answer.logprobs)
