"""One engine, measured: `python -m benchmarks.serving.worker ENGINE JOB.json` writes the job's result file.

A process of its own, because an engine keeps the memory that it was given.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.serving import traffic, trail
from benchmarks.serving.engines import ENGINES, Engine
from benchmarks.serving.turns import Turns

_WARM_TOKENS = 16


def main() -> None:
    """Start the engine that a job describes, run its measurements, write their results."""
    job = json.loads(Path(sys.argv[2]).read_text())
    engine = ENGINES[sys.argv[1]](job["engine"])
    result: dict[str, Any] = {"kv_tokens": engine.kv_tokens}
    if "greedy" in job:
        engine.flush()
        before = engine.verified() if job.get("drafts") else None
        result["greedy"] = engine.generate(job["greedy"]["prompts"], job["greedy"]["new_tokens"])
        if before is not None:
            result["greedy_acceptance_length"] = acceptance_length(before, engine.verified())
        if job["greedy"].get("again"):
            engine.flush()
            result["greedy_again"] = engine.generate(job["greedy"]["prompts"], job["greedy"]["new_tokens"])
    if "answers" in job:
        result["answers"] = [engine.generate(asked["prompts"], asked["new_tokens"]) for asked in job["answers"]]
    if "prefill" in job:
        engine.save_hidden(Path(job["prefill"]["file"]))
        engine.generate([job["prefill"]["ids"]], 1)
    if "decode" in job:
        result["decode"] = [decode_speed(engine, **case, drafts=job.get("drafts", False)) for case in job["decode"]]
    if "hit" in job:
        result["hit"] = first_token_after_hit(engine, **job["hit"])
    if "hits" in job:
        turns = Turns(*job["turns"])
        result["hits"] = [first_tokens(engine, **case, turn=turns.mine) for case in job["hits"]]
    if "traffic" in job:
        result["traffic"] = traffic.drive(engine, **job["traffic"])
    engine.close()
    Path(job["result"]).write_text(json.dumps(result))


def acceptance_length(before: tuple[int, int], after: tuple[int, int]) -> float | None:
    """Return the tokens that a verifying step gave a request between two counts; None if there was none."""
    steps, accepted = (b - a for a, b in zip(before, after, strict=True))
    return 1 + accepted / steps if steps else None


def decode_speed(
    engine: Engine, batch: int, context: int, new_tokens: int, repeats: int, vocab: int, text: list[int] | None = None,
    drafts: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measure decode tokens a second over cached contexts.

    The contexts are prefilled; then two generations of different length hit the cache, and their difference is decode
    alone.

    Args:
        engine: the engine.
        batch: requests at once.
        context: tokens of each request before the first measured one.
        new_tokens: tokens measured.
        repeats: measurements; the median, lowest and highest are reported. Of a text each has a piece of its own, and
            all their tokens by all their time are reported in place of the median.
        vocab: ids are drawn below this.
        text: ids that contexts are cut from, once more from the start where they end; None for arbitrary ids.
        drafts: whether the engine has drafts: then how many tokens a step gave is told, too, which is the text's doing.
    """
    engine.flush()
    rates, prefill_s, steps, accepted = [], [], 0, 0
    for repeat in range(repeats):
        if repeat == 0 or text is not None:
            starts = range(repeat * batch, (repeat + 1) * batch)
            if text is None:
                prompts = [_arbitrary_tokens(i, context, vocab) for i in starts]
            else:
                prompts = [[text[(i * 7919 + j) % len(text)] for j in range(context)] for i in starts]
            began = time.perf_counter()
            engine.generate(prompts, 1)
            prefill_s.append(time.perf_counter() - began)
            engine.generate(prompts, _WARM_TOKENS)
        before = engine.verified() if drafts else (0, 0)
        seconds = []
        for count in (_WARM_TOKENS, _WARM_TOKENS + new_tokens):
            began = time.perf_counter()
            engine.generate(prompts, count)
            seconds.append(time.perf_counter() - began)
        rates.append(batch * new_tokens / (seconds[1] - seconds[0]))
        after = engine.verified() if drafts else (0, 0)
        steps, accepted = steps + after[0] - before[0], accepted + after[1] - before[1]
    rates.sort()
    together = len(rates) / sum(1 / rate for rate in rates)
    return {
        "batch": batch,
        "context": context,
        "prefill_s": prefill_s[0],
        "decode_tok_s": rates[len(rates) // 2] if text is None else together,
        "decode_tok_s_low": rates[0],
        "decode_tok_s_high": rates[-1],
        **({"acceptance_length": acceptance_length((0, 0), (steps, accepted))} if drafts else {}),
    }


def first_token_after_hit(engine: Engine, cached: int, new_tokens: int, repeats: int, vocab: int) -> dict[str, float]:
    """Measure the time to the first token of a prompt whose beginning is cached.

    Args:
        engine: the engine.
        cached: tokens that an earlier prompt left in the cache.
        new_tokens: tokens after these.
        repeats: measurements, each with other new tokens; the median, lowest and highest are reported.
        vocab: ids are drawn below this.
    """
    endings = [_arbitrary_tokens(1 + i, new_tokens, vocab) for i in range(1 + repeats)]
    found = first_tokens(engine, _arbitrary_tokens(0, cached, vocab), endings)
    milliseconds = sorted(found["ms"][1:])  # the first warms up
    return {
        "hit_cached": cached,
        "hit_new": new_tokens,
        "hit_ttft_ms": milliseconds[repeats // 2],
        "hit_ttft_ms_low": milliseconds[0],
        "hit_ttft_ms_high": milliseconds[-1],
    }


def first_tokens(
    engine: Engine,
    prefix: list[int],
    endings: list[list[int]],
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, list[Any]]:
    """Ask prompts that begin alike one after the other, their beginning cached, for one token each.

    Args:
        engine: the engine.
        prefix: how all prompts begin; may be empty.
        endings: how each goes on.
        turn: what each prompt is asked in.

    Returns:
        Of each prompt the milliseconds, the token, and how many tokens the engine found in its cache.
    """
    with turn():
        engine.flush()
        if prefix:
            engine.generate([prefix], 1)
    found: dict[str, list[Any]] = {"ms": [], "tokens": [], "cached": []}
    for ending in endings:
        with turn():
            began = time.perf_counter()
            ((token,),) = engine.generate([prefix + ending], 1)
            found["ms"].append(1e3 * (time.perf_counter() - began))
        found["tokens"].append(token)
        found["cached"].append(engine.cached_tokens)
    return found


def _arbitrary_tokens(which: int, count: int, vocab: int) -> list[int]:
    return [(which * 7919 + j * 104729 + j * j * 31) % (vocab - 100) + 50 for j in range(count)]


# Processes that an engine starts import this file, too.
trail.watch_if_asked()

if __name__ == "__main__":
    main()
