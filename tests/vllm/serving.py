"""One vLLM engine in this process, driven step by step: what it answers, and what its scheduler decided.

Only one can be open at a time, because vLLM keeps its ranks in module variables.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from unittest import mock

from plan import Answer, Request
from tiny_models import VOCABULARY

if TYPE_CHECKING:
    from kvarn.vllm_backend.tails import TailCache

DTYPE = "kvarn_k4v2_g128"
# A request that can never be admitted would otherwise be waited for.
_MOST_STEPS = 3000
_NO_STEPS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One step of the scheduler.

    Args:
        prefix_lens: tokens in the cache before the step, by request.
        query_lens: tokens that the step computes, by request.
        admitted: first tail block of each request that started or resumed in the step.
        blocks: all blocks of each request, of records, then of its tail.
        preempted: requests that lost their blocks.
    """

    prefix_lens: dict[str, int]
    query_lens: dict[str, int]
    admitted: dict[str, int]
    blocks: dict[str, tuple[list[int], ...]]
    preempted: tuple[str, ...]


class Serving:
    """An open engine.

    Args:
        llm: the ``vllm.LLM``.
    """

    def __init__(self, llm: Any) -> None:
        self.engine = llm.llm_engine
        self.config = self.engine.vllm_config
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.steps: list[Scheduled] = []
        self._preempted: list[str] = []
        self._running: set[str] = set()
        self._watch_scheduler()

    @property
    def tail(self) -> TailCache | None:
        """The companion of the model's attention layers; None without a kvarn dtype."""
        from kvarn.vllm_backend import compat

        return compat.tail_of(self.config)

    @property
    def runner(self) -> str:
        """Module of the model runner that runs."""
        runner = type(self.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner)
        return next(kind.__module__ for kind in runner.__mro__ if kind.__name__ == "GPUModelRunner")

    @property
    def free_blocks(self) -> int:
        """Blocks that no request holds."""
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def preemptions(self) -> Counter[str]:
        """How often each request lost its blocks."""
        return Counter(name for step in self.steps for name in step.preempted)

    def flush(self) -> bool:
        """Empty the prefix cache; vLLM refuses while a request holds blocks."""
        return self.engine.reset_prefix_cache()

    def ask_alone(self, *requests: Request) -> dict[str, Answer]:
        """Answer each request by itself, each from an empty cache."""
        answers: dict[str, Answer] = {}
        for request in requests:
            assert self.flush()
            answers |= self.ask(request)
        assert self.flush()
        return answers

    def ask(self, *requests: Request, abort_steps: Mapping[str, int] = _NO_STEPS) -> dict[str, Answer]:
        """Answer requests that run together, and audit KVarN's own state after every step.

        Args:
            requests: names, prompts, and the tokens after which each starts and is aborted.
            abort_steps: steps, counted from 0, before which requests are aborted.
        """
        waiting, outputs = list(requests), {}
        tokens = Counter({request.name: 0 for request in requests})
        for i in range(_MOST_STEPS):
            for request in [request for request in waiting if _may_start(request, tokens)]:
                waiting.remove(request)
                self._add(request)
            self.engine.abort_request(_due(requests, tokens, abort_steps, i))
            if not waiting and not self.engine.has_unfinished_requests():
                break
            for output in self.engine.step():
                outputs[output.request_id] = output
                tokens[output.request_id] = len(output.outputs[0].token_ids)
            self._audit()
        else:
            raise RuntimeError(f"{sorted(set(tokens) - set(outputs))} got no token in {_MOST_STEPS} steps")
        preemptions = self.preemptions
        return {r.name: _answer(r, outputs.get(r.name), preemptions[r.name]) for r in requests}

    def _add(self, request: Request) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0,
            max_tokens=request.new_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=VOCABULARY if request.distribution else 0,
        )
        self.engine.add_request(request.name, {"prompt_token_ids": request.tokens}, params)

    def _audit(self) -> None:
        """Check that no sink slot leaked or is shared, and that no request lost its open tile."""
        tail = self.tail
        if tail is None:
            return
        tail.pool.state.check_integrity()
        if int(tail.pool.state.faults):
            raise RuntimeError(f"{int(tail.pool.state.faults)} requests lost their open tile")

    def _watch_scheduler(self) -> None:
        schedule, preempt = self.scheduler.schedule, self.scheduler._preempt_request

        def watched_schedule(*args: Any, **kwargs: Any) -> Any:
            self._preempted.clear()
            output = schedule(*args, **kwargs)
            self._note(output)
            return output

        def watched_preempt(request: Any, *args: Any, **kwargs: Any) -> None:
            self._preempted.append(_name(request.request_id))
            preempt(request, *args, **kwargs)

        self.scheduler.schedule, self.scheduler._preempt_request = watched_schedule, watched_preempt

    def _note(self, output: Any) -> None:
        """Note a step. Who was admitted is worked out from who ran before, not from what workers are told."""
        cached = output.scheduled_cached_reqs
        prefix_lens = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        prefix_lens |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        manager = self.scheduler.kv_cache_manager
        blocks = {_name(rid): manager.get_block_ids(rid) for rid in prefix_lens}
        self._running -= {*self._preempted, *map(_name, output.finished_req_ids)}
        admitted = {name: found[-1][0] for name, found in blocks.items() if name not in self._running}
        self._running |= set(blocks)
        self.steps.append(
            Scheduled(
                prefix_lens={_name(rid): length for rid, length in prefix_lens.items()},
                query_lens={_name(rid): count for rid, count in output.num_scheduled_tokens.items()},
                admitted=admitted,
                blocks=blocks,
                preempted=tuple(self._preempted),
            )
        )


@contextmanager
def serving(model: Path, **options: Any) -> Iterator[Serving]:
    """Open an engine, and close it.

    Args:
        model: folder of the model.
        options: arguments of ``vllm.LLM`` beside those that all engines here share.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    shared = {
        "kv_cache_dtype": DTYPE,
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 1024,
        "max_logprobs": VOCABULARY,
        "kv_cache_memory_bytes": 64 << 20,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
    }
    try:
        with _uncollected():
            engine = Serving(LLM(str(model), **shared | options))
    except BaseException:
        cleanup_dist_env_and_memory()
        raise
    try:
        yield engine
    finally:
        # Frees all that an engine took; left alone, one that is watched would never be.
        with _uncollected():
            engine.engine.engine_core.shutdown()
        gc.collect()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep vLLM from collecting garbage, which it does seven times an engine: two thirds of its time when tiny."""
    with mock.patch("gc.collect"):
        yield


def _may_start(request: Request, tokens: Counter[str]) -> bool:
    if request.starts_after is None:
        return True
    name, count = request.starts_after
    return tokens[name] >= count


def _due(requests: Iterable[Request], tokens: Counter[str], abort_steps: Mapping[str, int], step: int) -> list[str]:
    """Return who is to be aborted before a step; vLLM ignores those that have ended."""
    by_token = [r.name for r in requests if r.abort_at_token is not None and tokens[r.name] >= r.abort_at_token]
    return by_token + [name for name, at in abort_steps.items() if at == step]


def _name(request_id: str) -> str:
    """Return a request's name; vLLM appends a random part."""
    return request_id.rpartition("-")[0]


def _answer(request: Request, output: Any, preemptions: int) -> Answer:
    """Return what came back; a request that is aborted gets no last output of vLLM."""
    if output is None:
        return Answer(request.tokens, [], [], 0, "abort", preemptions, [])
    completion = output.outputs[0]
    token_ids = list(completion.token_ids)
    places = completion.logprobs
    distribution = []
    if request.distribution:
        distribution = [places[0][token].logprob for token in range(VOCABULARY)]
    return Answer(
        prompt=request.tokens,
        output_ids=token_ids,
        logprobs=[place[token].logprob for place, token in zip(places, token_ids, strict=True)],
        cached_tokens=output.num_cached_tokens or 0,
        finish=completion.finish_reason or "abort",
        retractions=preemptions,
        distribution=distribution,
    )
