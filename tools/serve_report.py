"""Ask a server that runs with KVarN something, and say what its KV cache costs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from kvarn.bench.engines import CacheFacts
from kvarn.bench.sanity import PASSAGE, QUESTION
from kvarn.bench.server import ServerError, call
from kvarn.core.capacity import CacheShape, cache_shape
from kvarn.presets import Preset

ANSWER_TOKENS = 48
GIB = 1 << 30


def report(url: str, facts: CacheFacts, model: str, preset: Preset | None) -> None:
    """Ask the server, and print question, answer and what the cache costs.

    Args:
        url: address of the server.
        facts: what the server tells of itself.
        model: folder or hub name of the model.
        preset: the preset in use; None for a cache dtype of the engine's own.
    """
    messages = [{"role": "user", "content": f"{PASSAGE.read_text()}\n{QUESTION}"}]
    began = time.monotonic()
    request = {"model": facts.model, "messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0}
    answer = call(f"{url}/v1/chat/completions", request)
    seconds = time.monotonic() - began
    text, usage = (answer["choices"][0]["message"]["content"] or "").strip(), answer["usage"]
    if not text:
        raise ServerError("The server's answer is empty, so that something is wrong; see its log.")
    print(f"\nquestion   {QUESTION} (about the text in kvarn/bench/{PASSAGE.name})")
    print(f"answer     {text}")
    print(f"           {usage['completion_tokens']} tokens in {seconds:.1f} s, {facts.engine}")
    for line in cache_lines(facts, model, preset, usage["prompt_tokens"]):
        print(line)
    example = json.dumps({"model": facts.model, "messages": [{"role": "user", "content": "Hello!"}]})
    print(f"\nserver     {url}, an OpenAI endpoint:")
    print(f"           curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{example}'", flush=True)


def cache_lines(facts: CacheFacts, model: str, preset: Preset | None, prompt_tokens: int) -> Iterator[str]:
    """Yield what the server reports of its cache, beside what kvarn.core.capacity plans for the model."""
    if preset is None:
        yield f"KV cache   {facts.tokens:,} tokens, dtype {facts.dtype}"
        return
    shape = shape_of(preset, model, facts)
    tile, token_bytes = preset.tile_tokens, shape.bytes_per_token
    fp16_bytes = 2 * shape.raw_bytes_per_token // shape.raw_bytes
    sealed = max(0, prompt_tokens - shape.tail_tokens) // tile * tile
    yield f"           {sealed} of the {prompt_tokens} prompt tokens were read from {preset.name} records meanwhile"
    yield f"KV cache   {facts.tokens:,} tokens in records, {token_bytes:,} bytes a token"
    yield f"           fp16 takes {fp16_bytes:,} bytes a token, {fp16_bytes / token_bytes:.2f} times as many"
    if facts.requests is None or facts.gib is None:
        yield "           exact tails are counted among the tokens, as vLLM counts them for its longest context"
        return
    records, exact = (facts.tokens // tile + 1) * shape.page_bytes, shape.fixed_bytes(facts.requests)
    planned, fp16 = records + exact, facts.tokens * fp16_bytes
    yield f"memory     {facts.gib:.2f} GiB says the server, {planned / GIB:.2f} GiB the plan:"
    yield f"           {records / GIB:.2f} of records, {exact / GIB:.2f} of exact rows for {facts.requests} requests"
    yield f"           fp16 takes {fp16 / GIB:.2f} GiB for as many tokens, {fp16 / planned:.2f} times the plan"


def shape_of(preset: Preset, model: str, facts: CacheFacts) -> CacheShape:
    """Return what one rank caches, from the model's config.json."""
    path = Path(model) / "config.json"
    if not path.is_file():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(model, "config.json"))
    config = json.loads(path.read_text())
    config = config.get("text_config", config)
    heads = config["num_attention_heads"]
    return cache_shape(
        preset,
        layers=config["num_hidden_layers"],
        kv_heads=max(1, (config.get("num_key_value_heads") or heads) // facts.ranks),
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        raw_bytes=facts.raw_bytes,
    )
