"""A transformers model over a tile cache: exact where all is exact, and the same however it is fed."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from kvarn.errors import CapacityError, UnknownPreset, UnsupportedConfig  # noqa: E402 (after the check)
from kvarn.hf import ATTENTION, TileCache  # noqa: E402

TOKENS = 300
# float32 sums in another order
CLOSE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def references(monkeypatch):
    """The interpreter is too slow for a model."""
    monkeypatch.delenv("KVARN_FORCE_TRITON", raising=False)


SMALL = {
    "vocab_size": 256, "hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 64, "initializer_range": 0.08,
}  # fmt: skip


def with_attention(model, attention=ATTENTION):
    model.set_attn_implementation(attention)
    return model.eval()


def make_model(attention=ATTENTION, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_hidden_layers=2, **options)
    return with_attention(transformers.LlamaForCausalLM(config), attention)


def make_windowed(attention=ATTENTION):
    torch.manual_seed(0)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(**SMALL, num_hidden_layers=3, layer_types=types, sliding_window=70)
    return with_attention(transformers.Gemma3ForCausalLM(config), attention)


def make_with_sinks(attention=ATTENTION):
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **SMALL, num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=70, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.sinks.data = 5 + torch.randn(3)
    return with_attention(model, attention)


def prompt(batch=1):
    return torch.randint(3, 256, (batch, TOKENS), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids, chunks, cache):
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(chunks, dim=1)], dim=1)


def test_with_an_exact_tail_longer_than_the_context_nothing_is_lost(monkeypatch):
    monkeypatch.setenv("KVARN_TAIL_TOKENS", "512")
    want = logits(make_model("sdpa"), prompt(2), TOKENS, transformers.DynamicCache())
    model = make_model()
    for chunks in (TOKENS, [200, 99, 1], 48):
        got = logits(model, prompt(2), chunks, TileCache(model, max_tokens=TOKENS, batch=2))
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize(("make", "attention"), [(make_windowed, "sdpa"), (make_with_sinks, "eager")])
def test_layers_with_a_window_are_those_of_transformers(make, attention, monkeypatch):
    monkeypatch.setenv("KVARN_TAIL_TOKENS", "512")
    want = logits(make(attention), prompt(2), TOKENS, transformers.DynamicCache())
    model = make()
    for chunks in (TOKENS, [200, 99, 1], 48):
        got = logits(model, prompt(2), chunks, TileCache(model, max_tokens=TOKENS, batch=2))
        torch.testing.assert_close(got, want, **CLOSE)


def test_a_resumed_or_reset_cache_drops_rows_of_windows_too(monkeypatch):
    monkeypatch.setenv("KVARN_CANONICAL", "1")
    model, ids = make_windowed(), prompt()
    cache = TileCache(model)
    want = logits(model, ids, 128, cache)
    assert cache.resume() == 256
    torch.testing.assert_close(logits(model, ids[:, 256:], 128, cache), want[:, 256:], **CLOSE)
    assert [layer.get_seq_length() for layer in cache.layers] == [TOKENS] * 3
    cache.reset()
    assert torch.equal(logits(model, ids, 128, cache), want)


def test_canonical_results_do_not_depend_on_chunks(monkeypatch):
    monkeypatch.setenv("KVARN_CANONICAL", "1")
    model = make_model()
    whole = logits(model, prompt(), TOKENS, TileCache(model))
    for chunks in (128, 48, [130, 128, 1, 1, 40]):
        torch.testing.assert_close(logits(model, prompt(), chunks, TileCache(model)), whole, **CLOSE)
    exact = logits(make_model("sdpa"), prompt(), TOKENS, transformers.DynamicCache())
    assert (whole - exact).abs().max() > 0.01


def test_generation_from_records_is_that_of_its_logits():
    model = make_model()
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = TileCache(model)
    ids = model.generate(prompt(), past_key_values=cache, **options)
    assert cache.get_seq_length() == ids.shape[1] - 1
    again = TileCache(model)
    steps = logits(model, ids[:, :-1], [TOKENS, *[1] * 39], again)
    assert steps[0, TOKENS - 1 :].argmax(dim=-1).tolist() == ids[0, TOKENS:].tolist()


def test_a_reset_cache_is_a_new_one():
    model = make_model()
    cache = TileCache(model)
    first = logits(model, prompt(), 128, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits(model, prompt(), 128, cache), first)


def test_what_cannot_be_cached_is_refused():
    model = make_model()
    with pytest.raises(UnknownPreset):
        TileCache(model, "kvarn_k9v9_g128")
    with pytest.raises(UnsupportedConfig, match="attention is 'sdpa'"):
        TileCache(make_model("sdpa"))
    every_layer = transformers.MistralConfig(**SMALL, num_hidden_layers=1, sliding_window=70)
    with pytest.raises(UnsupportedConfig, match="no layer that attends to the whole context"):
        TileCache(with_attention(transformers.MistralForCausalLM(every_layer)))
    with pytest.raises(CapacityError, match="299 tokens, not 300"):
        logits(model, prompt(), TOKENS, TileCache(model, max_tokens=299))
    with pytest.raises(ValueError, match="1 sequences, not 2"):
        logits(model, prompt(2), TOKENS, TileCache(model))
    with pytest.raises(NotImplementedError, match="needs a kvarn.hf.TileCache"):
        logits(model, prompt(), TOKENS, transformers.DynamicCache())
    mask = torch.ones_like(prompt())
    mask[0, :5] = 0
    with pytest.raises(NotImplementedError, match="without padding"):
        model(prompt(), attention_mask=mask, past_key_values=TileCache(model))
