"""Ask one engine, and keep what its cache holds: ``python ask_engine.py ENGINE MODEL RESULTS [RANKS]``.

With CROSS_TEST_RECORDS every layer caches rows made from its index and the token's position in place of the model's
own, and each rank saves the records of the only running request, and the tiles that every step sealed, after every
step. Where engines spawn their workers, those import this file and so replace the rows there.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forking import fork_instead_of_spawning

PROMPT_TOKENS, NEW_TOKENS, CHUNK_TOKENS = 300, 90, 128
LAYERS, KV_HEADS, HEAD_DIM, POSITIONS = 2, 2, 64, 512
VOCABULARY = 512
_RECORDS = "CROSS_TEST_RECORDS"
_BACKEND = "CROSS_TEST_BACKEND"


def prompt() -> list[int]:
    """Return the prompt."""
    generator = torch.Generator().manual_seed(7)
    tokens: list[int] = torch.randint(3, VOCABULARY, (PROMPT_TOKENS,), generator=generator).tolist()
    return tokens


def replace_rows(backend: str, path: Path) -> None:
    """Make an adapter cache the rows of a table, and save the records that follow from it."""
    module = importlib.import_module(backend)
    attention: Callable[..., torch.Tensor] = module.attention
    table = torch.randn(LAYERS, 2, POSITIONS, KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(11))
    indices: dict[int, int] = {}
    saved: dict[int, torch.Tensor] = {}
    sealed: list[list[int]] = []

    def replaced(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, step: Any, *rest: Any, **options: Any
    ) -> torch.Tensor:
        index = indices.setdefault(id(layer), len(indices))
        position = step.token_position[: k.shape[0]].long()
        rank = torch.distributed.get_rank()
        heads = slice(rank * k.shape[1], (rank + 1) * k.shape[1])
        k, v = (table[index, which][position, heads].to(k.dtype) for which in (0, 1))
        out = attention(q, k, v, layer, step, *rest, **options)
        tiles = int(step.seq_lens[0]) // layer.config.tile_tokens
        saved[index] = layer.records[layer.pages_of(step.block_table[0, :tiles].long())].clone()
        if index == LAYERS - 1:
            sealed.append(step.seal_tile.tolist())
            torch.save({"records": saved, "sealed": sealed}, path.with_suffix(f".{rank}.pt"))
        return out

    module.attention = replaced


def ask_sglang(model: str, ranks: int) -> tuple[list[int], list[float]]:
    """Return tokens and log probabilities of SGLang."""
    import sglang

    if ranks == 1:
        fork_instead_of_spawning()
    engine = sglang.Engine(
        model_path=model,
        device="cpu",
        dtype="float32",
        kv_cache_dtype="kvarn_k4v2_g128",
        context_length=2048,
        max_total_tokens=2048,
        chunked_prefill_size=CHUNK_TOKENS,
        skip_server_warmup=True,
        skip_tokenizer_init=True,
        tp_size=ranks,
    )
    options = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    answer = engine.generate(input_ids=prompt(), sampling_params=options, return_logprob=True)
    logprobs = [logprob for logprob, *_ in answer["meta_info"]["output_token_logprobs"]]
    engine.shutdown()
    return answer["output_ids"], logprobs


def ask_vllm(model: str, ranks: int) -> tuple[list[int], list[float]]:
    """Return tokens and log probabilities of vLLM."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        kv_cache_dtype="kvarn_k4v2_g128",
        max_model_len=1024,
        enforce_eager=True,
        max_num_seqs=8,
        max_num_batched_tokens=CHUNK_TOKENS,
        kv_cache_memory_bytes=64 << 20,
        tensor_parallel_size=ranks,
    )
    options = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
    answer = engine.generate({"prompt_token_ids": prompt()}, options, use_tqdm=False)[0].outputs[0]
    tokens = list(answer.token_ids)
    return tokens, [places[token].logprob for token, places in zip(tokens, answer.logprobs, strict=True)]


def main() -> None:
    """Run the command line."""
    engine, model, results, *ranks = sys.argv[1:]
    tokens, logprobs = {"sglang": ask_sglang, "vllm": ask_vllm}[engine](model, *map(int, ranks or "1"))
    Path(results).write_text(json.dumps({"tokens": tokens, "logprobs": logprobs}))


if os.environ.get(_RECORDS):
    replace_rows(os.environ[_BACKEND], Path(os.environ[_RECORDS]))

if __name__ == "__main__":
    main()
