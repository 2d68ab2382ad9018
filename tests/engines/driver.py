"""Start one SGLang engine, carry out a plan, write the answers: ``python driver.py PLAN RESULTS``.

A process of its own, because KVarN reads its environment once and SGLang ends its processes with the parent's.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import instruments
from forking import fork_instead_of_spawning
from plan import Answer, Request, read_plan
from tiny_models import VOCABULARY

instruments.install()

# SGLang leaves a request that it can never admit in its queue for good.
_STEP_TIMEOUT_S = 150
_FLUSH_TRIALS = 50


class Group:
    """Requests that run together.

    Args:
        engine: the engine.
        answers: answers so far; new ones are added.
        requests: what to run.
    """

    def __init__(self, engine: Any, answers: dict[str, Answer], requests: list[Request]) -> None:
        self._engine = engine
        self._answers = answers
        self._requests = requests
        self._tokens = dict.fromkeys((request.name for request in requests), 0)
        self._progress = asyncio.Condition()

    async def run(self) -> None:
        """Run all requests to their end."""
        served = asyncio.gather(*(self._serve(request) for request in self._requests))
        await asyncio.wait_for(served, _STEP_TIMEOUT_S)

    async def _serve(self, request: Request) -> None:
        if request.starts_after is not None:
            name, tokens = request.starts_after
            async with self._progress:
                await self._progress.wait_for(lambda: self._tokens[name] >= tokens)
        prompt = self._prompt(request)
        parts = await self._engine.async_generate(
            input_ids=prompt,
            sampling_params={"temperature": 0, "max_new_tokens": request.new_tokens, "ignore_eos": True},
            return_logprob=request.logprobs,
            top_logprobs_num=VOCABULARY if request.distribution else 0,
            stream=True,
            rid=request.name,
        )
        timer = asyncio.create_task(self._abort_later(request))
        last: dict[str, Any] = {}
        async for last in parts:
            await self._note(request, len(last.get("output_ids") or ()))
        timer.cancel()
        answer = _answer(prompt, last)
        if answer.finish == "length" and len(answer.output_ids) != request.new_tokens:
            raise RuntimeError(f"{request.name} got {len(answer.output_ids)} tokens of {request.new_tokens}")
        self._answers[request.name] = answer

    async def _note(self, request: Request, tokens: int) -> None:
        async with self._progress:
            self._tokens[request.name] = tokens
            self._progress.notify_all()
        if request.abort_at_token is not None and tokens >= request.abort_at_token:
            self._engine.tokenizer_manager.abort_request(request.name)

    async def _abort_later(self, request: Request) -> None:
        if request.abort_after_s is not None:
            await asyncio.sleep(request.abort_after_s)
            self._engine.tokenizer_manager.abort_request(request.name)

    def _prompt(self, request: Request) -> list[int]:
        if request.follows is None:
            return request.tokens
        earlier = self._answers[request.follows]
        return earlier.prompt + earlier.output_ids + request.tokens


def _answer(prompt: list[int], last: dict[str, Any]) -> Answer:
    meta = last["meta_info"]
    logprobs = [logprob for logprob, *_ in meta.get("output_token_logprobs") or ()]
    finish = (meta["finish_reason"] or {}).get("type", "none")
    return Answer(
        prompt=prompt,
        output_ids=list(last.get("output_ids") or ()),
        logprobs=logprobs,
        # A request that is aborted before its first pass has none.
        cached_tokens=meta.get("cached_tokens", 0),
        finish=finish,
        retractions=meta.get("num_retractions", 0),
        distribution=_by_token(meta.get("output_top_logprobs") or ()),
    )


def _by_token(places: Sequence[Sequence[tuple[float, int, str]]]) -> list[float]:
    """Return the log probabilities of the first place, by token."""
    return [logprob for logprob, *_ in sorted(places[0], key=lambda entry: entry[1])] if places else []


def _flush(engine: Any) -> bool:
    """Empty the cache; a scheduler that overlaps steps holds a finished request for a moment."""
    for _ in range(_FLUSH_TRIALS):
        if engine.flush_cache().success:
            return True
        time.sleep(0.1)
    return False


def main(plan_path: Path, results_path: Path) -> None:
    """Carry out the plan."""
    import sglang

    fork_instead_of_spawning()
    options, steps = read_plan(plan_path)
    engine = sglang.Engine(**options)
    answers: dict[str, Answer] = {}
    flushed = []
    for step in steps:
        if step.requests:
            engine.loop.run_until_complete(Group(engine, answers, step.requests).run())
        else:
            flushed.append(_flush(engine))
    # Written before the shutdown, which ends this process's children by force.
    found = {"answers": {name: asdict(answer) for name, answer in answers.items()}, "flushed": flushed}
    results_path.write_text(json.dumps(found))
    engine.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
