"""The engines that are compared, behind one interface: what they are started with and how they are asked."""

from __future__ import annotations

import argparse
import functools
import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from benchmarks.serving.capture import append_hidden, save_hidden

BASELINE = "auto"
_TILE = 128
_SGLANG_METHODS = {"draft_model": "STANDALONE", "eagle": "EAGLE", "eagle3": "EAGLE3", "mtp": "NEXTN", "ngram": "NGRAM"}
# What a prefill of one text is given.
_PREFILL_KV_TOKENS = 16384
_PREFILL_MEMORY = 0.2


class Engine(ABC):
    """A running engine.

    Args:
        arguments: of the engine's own constructor.
    """

    kv_tokens: int
    # Of the prompts of the last call.
    cached_tokens: int
    # What the engine calls a cache of 8-bit floats.
    fp8 = "fp8"

    @staticmethod
    @abstractmethod
    def arguments(model: str, model_dtype: str, dtype: str, requests: int) -> dict[str, Any]:
        """Return what the engine is started with to serve."""

    @staticmethod
    @abstractmethod
    def prefill_arguments(file: Path) -> dict[str, Any]:
        """Return what it is started with besides, to prefill in chunks of one tile without graphs.

        It takes little memory, so that several engines find room beside each other.
        """

    @staticmethod
    @abstractmethod
    def parallel(ranks: int) -> dict[str, Any]:
        """Return what the engine is started with besides, to share its work among so many GPUs."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], new_tokens: int | list[int]) -> list[list[int]]:
        """Generate greedily, exactly that many tokens a prompt."""

    @staticmethod
    @abstractmethod
    def speculation(method: str, draft: str | None, drafts: int) -> dict[str, Any]:
        """Return what the engine is started with besides, to verify so many drafts a step and to count them."""

    @staticmethod
    @abstractmethod
    def invariance() -> tuple[dict[str, Any], dict[str, str]]:
        """Return arguments and environment that make a row's result independent of the batch. On GPUs alone."""

    @abstractmethod
    def verified(self) -> tuple[int, int]:
        """Return how many verifying steps of a request there were up to now, and how many drafts they accepted."""

    @abstractmethod
    def flush(self) -> None:
        """Empty the cache."""

    @abstractmethod
    def save_hidden(self, file: Path) -> None:
        """From now on append the hidden states that the language model head reads to a file, float16."""

    @abstractmethod
    def close(self) -> None:
        """End the engine."""


class SGLang(Engine):
    """SGLang's offline engine."""

    fp8 = "fp8_e4m3"

    def __init__(self, arguments: dict[str, Any]) -> None:
        import sglang

        self._engine = sglang.Engine(**arguments)
        self._steps = self._accepted = 0
        self.kv_tokens = self._engine.get_server_info()["max_total_num_tokens"]

    @staticmethod
    def arguments(model: str, model_dtype: str, dtype: str, requests: int) -> dict[str, Any]:
        """Return what the engine is started with to serve."""
        common = {"model_path": model, "dtype": model_dtype, "kv_cache_dtype": dtype, "random_seed": 0}
        pages = {"page_size": _TILE} if dtype == BASELINE else {}
        return {**common, **pages, "skip_server_warmup": True, "log_level": "info", "max_running_requests": requests}

    @staticmethod
    def prefill_arguments(file: Path) -> dict[str, Any]:
        """Return what it is started with besides, to prefill in chunks of one tile without graphs."""
        hook = {
            "name": "hidden",
            "target_modules": ["model.norm"],
            "hook_factory": f"{save_hidden.__module__}:{save_hidden.__name__}",
            "config": {"file": str(file)},
        }
        few = {"max_total_tokens": _PREFILL_KV_TOKENS, "disable_cuda_graph": True}
        return {**few, "chunked_prefill_size": _TILE, "forward_hooks": [hook]}

    @staticmethod
    def parallel(ranks: int) -> dict[str, Any]:
        """Return what the engine is started with besides, to share its work among so many GPUs."""
        return {"tp_size": ranks}

    def generate(self, prompts: list[list[int]], new_tokens: int | list[int]) -> list[list[int]]:
        """Generate greedily, exactly that many tokens a prompt."""
        sampling = [
            {"temperature": 0.0, "max_new_tokens": count, "ignore_eos": True} for count in _each(prompts, new_tokens)
        ]
        outs = self._engine.generate(input_ids=prompts, sampling_params=sampling)
        steps = sum(out["meta_info"].get("spec_verify_ct", 0) for out in outs)
        self._steps += steps
        # a request's first token comes from its prefill, then one of each step beside the drafts
        self._accepted += sum(len(out["output_ids"]) - 1 for out in outs) - steps if steps else 0
        self.cached_tokens = sum(out["meta_info"].get("cached_tokens", 0) for out in outs)
        return [out["output_ids"] for out in outs]

    @staticmethod
    def speculation(method: str, draft: str | None, drafts: int) -> dict[str, Any]:
        """Return what the engine is started with besides, to verify so many drafts a step and to count them."""
        chain = {
            "speculative_num_steps": drafts,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": drafts + 1,
        }
        if method == "ngram":
            chain = {"speculative_ngram_max_bfs_breadth": 1, "speculative_num_draft_tokens": drafts + 1}
        model = {"speculative_draft_model_path": draft} if draft else {}
        return {"speculative_algorithm": _SGLANG_METHODS[method], **chain, **model}

    @staticmethod
    def invariance() -> tuple[dict[str, Any], dict[str, str]]:
        """Return arguments and environment that make a row's result independent of the batch. On GPUs alone."""
        return {"enable_deterministic_inference": True}, {}

    def verified(self) -> tuple[int, int]:
        """Return how many verifying steps of a request there were up to now, and how many drafts they accepted."""
        return self._steps, self._accepted

    def flush(self) -> None:
        """Empty the cache."""
        self._engine.flush_cache()

    def save_hidden(self, file: Path) -> None:
        """Do nothing: the hook is among the engine's arguments."""

    def close(self) -> None:
        """End the engine."""
        self._engine.shutdown()


class VLLM(Engine):
    """vLLM's offline engine."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        # The hook on the final norm must reach the worker without being pickled.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self._engine = LLM(**arguments)
        self.kv_tokens = self._engine.llm_engine.vllm_config.cache_config.kv_cache_size_tokens

    @staticmethod
    def arguments(model: str, model_dtype: str, dtype: str, requests: int) -> dict[str, Any]:
        """Return what the engine is started with to serve."""
        return {
            "model": model,
            "dtype": model_dtype,
            "kv_cache_dtype": dtype,
            "max_num_seqs": requests,
            "skip_tokenizer_init": True,
            "seed": 0,
        }

    @staticmethod
    def prefill_arguments(file: Path) -> dict[str, Any]:
        """Return what it is started with besides, to prefill in chunks of one tile without graphs."""
        del file
        few = {"max_num_seqs": 8, "gpu_memory_utilization": _PREFILL_MEMORY}
        return {**few, "max_num_batched_tokens": _TILE, "enforce_eager": True}

    @staticmethod
    def parallel(ranks: int) -> dict[str, Any]:
        """Return what the engine is started with besides, to share its work among so many GPUs."""
        return {"tensor_parallel_size": ranks}

    def generate(self, prompts: list[list[int]], new_tokens: int | list[int]) -> list[list[int]]:
        """Generate greedily, exactly that many tokens a prompt."""
        from vllm import SamplingParams

        sampling = [
            SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in _each(prompts, new_tokens)
        ]
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self._engine.generate(asked, sampling, use_tqdm=False)
        self.cached_tokens = sum(answer.num_cached_tokens or 0 for answer in answers)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    @staticmethod
    def speculation(method: str, draft: str | None, drafts: int) -> dict[str, Any]:
        """Return what the engine is started with besides, to verify so many drafts a step and to count them."""
        how = {"model": draft} if draft else {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
        return {
            "speculative_config": {"method": method, "num_speculative_tokens": drafts, **how},
            "disable_log_stats": False,
        }

    @staticmethod
    def invariance() -> tuple[dict[str, Any], dict[str, str]]:
        """Return arguments and environment that make a row's result independent of the batch. On GPUs alone."""
        return {}, {"VLLM_BATCH_INVARIANT": "1"}

    def verified(self) -> tuple[int, int]:
        """Return how many verifying steps of a request there were up to now, and how many drafts they accepted."""
        found = {metric.name: getattr(metric, "value", 0) for metric in self._engine.get_metrics()}
        return tuple(int(found.get(f"vllm:spec_decode_num_{what}", 0)) for what in ("drafts", "accepted_tokens"))

    def flush(self) -> None:
        """Empty the cache."""
        self._engine.reset_prefix_cache()

    def save_hidden(self, file: Path) -> None:
        """From now on append the hidden states that the language model head reads to a file, float16."""
        append = functools.partial(append_hidden, file)
        self._engine.apply_model(lambda model: model.model.norm.register_forward_hook(append) and None)

    def close(self) -> None:
        """Do nothing: the engine ends with its process."""


ENGINES: dict[str, type[Engine]] = {"sglang": SGLang, "vllm": VLLM}


def _each(prompts: list[list[int]], new_tokens: int | list[int]) -> list[int]:
    return [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens


def add_arguments(parser: argparse.ArgumentParser, *others: str) -> None:
    """Add what every benchmark asks of an engine; `others` than engines may answer too."""
    parser.add_argument("--engine", required=True, choices=[*ENGINES, *others])
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--model-dtype", default="float16")
    parser.add_argument("--arguments", type=json.loads, default={}, help="more arguments of the engine, JSON")
    parser.add_argument("--requests", type=int, default=64, help="running requests allowed")


def add_dtype_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what benchmarks ask that compare cache dtypes with the model's own."""
    parser.add_argument("--dtypes", nargs="+", default=["kvarn_k4v2_g128"], help="cache dtypes beside the model's own")
    parser.add_argument(
        "--baseline-arguments", type=json.loads, default={}, help="more for the model's own dtype, JSON"
    )


def started_with(
    engine: str,
    model: str,
    model_dtype: str,
    dtype: str,
    requests: int,
    arguments: dict[str, Any],
    baseline_arguments: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what an engine is started with to serve with a cache dtype.

    Args:
        engine: one of `ENGINES`.
        model: checkpoint folder.
        model_dtype: of weights and of the baseline's cache.
        dtype: of the cache.
        requests: running requests allowed.
        arguments: more of the engine's own.
        baseline_arguments: more for the model's own cache dtype.
    """
    ours = ENGINES[engine].arguments(model, model_dtype, dtype, requests)
    return {**ours, **arguments, **((baseline_arguments or {}) if dtype == BASELINE else {})}
