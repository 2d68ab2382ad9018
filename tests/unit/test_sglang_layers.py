"""Which layers of a model SGLang keeps beside tiles, and which flags it then can't have."""

from types import SimpleNamespace

import pytest

from kvarn.core.layers import LayerKind
from kvarn.presets import get_preset
from kvarn.sglang_backend import compat_layers

PRESET = get_preset("kvarn_k4v2_g128")
GEMMA = {"hf_config": SimpleNamespace(architectures=["Gemma3ForCausalLM"])}
SPLIT = {"is_hybrid_swa": True, "swa_attention_layer_ids": [0], "full_attention_layer_ids": [1]}


def model_config(*layer_types, **changes):
    """SGLang's description of a model with layers of these types."""
    text = SimpleNamespace(layer_types=layer_types, num_hidden_layers=len(layer_types), sliding_window=512)
    told = {
        "hf_config": SimpleNamespace(architectures=["SomeForCausalLM"]),
        "hf_text_config": text,
        "attention_arch": SimpleNamespace(name="MHA"),
        "is_hybrid_swa": False,
        "is_local_attention_model": False,
        "is_draft_model": False,
        "is_multimodal": False,
    }
    return SimpleNamespace(**{**told, **changes})


@pytest.fixture
def no_states(monkeypatch):
    """No model has recurrent states."""
    monkeypatch.setattr(compat_layers, "_hybrid_of", lambda _: None)


@pytest.fixture
def states(monkeypatch):
    """Every model has recurrent states, and attends in layer 1."""
    monkeypatch.setattr(compat_layers, "_hybrid_of", lambda _: SimpleNamespace(full_attention_layer_ids=[1]))


def test_dense_model_needs_nothing_beside_tiles(no_states):
    assert compat_layers.kept_beside(model_config("full_attention")) == frozenset()


@pytest.mark.parametrize("changes", [GEMMA, SPLIT], ids=["by KVarN", "by SGLang"])
def test_windows_are_kept_where_they_get_a_pool(no_states, changes):
    config = model_config("sliding_attention", "full_attention", **changes)
    assert compat_layers.kept_beside(config) == {LayerKind.MODEL_DTYPE}
    assert compat_layers.layer_ids(SimpleNamespace(model_config=config)) == [1]


@pytest.mark.parametrize(
    "changes",
    [{}, {**SPLIT, "hf_config": SimpleNamespace(architectures=["Gemma4ForCausalLM"])}],
    ids=["in one pool", "other backends only"],
)
def test_other_windows_are_not_kept(no_states, changes):
    config = model_config("sliding_attention", "full_attention", **changes)
    assert compat_layers.kinds_of(config) == {LayerKind.MODEL_DTYPE, LayerKind.TILES}
    assert compat_layers.kept_beside(config) == frozenset()


def test_states_are_kept(states):
    config = model_config("linear_attention", "full_attention")
    assert compat_layers.kept_beside(config) == {LayerKind.RECURRENT}
    assert compat_layers.layer_ids(SimpleNamespace(model_config=config)) == [1]


def test_windows_and_states_in_one_model_are_not_kept(states):
    assert compat_layers.kept_beside(model_config("linear_attention", "full_attention", **SPLIT)) == frozenset()


@pytest.mark.parametrize(
    ("dtype", "draft", "split"), [(PRESET.name, False, True), ("auto", False, False), (PRESET.name, True, False)]
)
def test_windows_get_a_pool_in_the_target_of_a_kvarn_dtype(dtype, draft, split):
    config = model_config("sliding_attention", "full_attention", **GEMMA, is_draft_model=draft)
    compat_layers.split_windows(config, SimpleNamespace(kv_cache_dtype=dtype))
    assert config.is_hybrid_swa is split
    assert getattr(config, "full_attention_layer_ids", None) == ([1] if split else None)


def test_images_that_are_attended_to_in_both_directions_are_refused(no_states):
    view = SimpleNamespace(disable_hybrid_swa_memory=False)
    for images in (False, True):
        config = model_config("sliding_attention", "full_attention", **GEMMA, is_multimodal=images)
        reasons = compat_layers.layer_reasons(view, config, PRESET)
        assert ["--enable-multimodal" in reason for reason in reasons] == [True] * images


@pytest.mark.parametrize(
    ("changes", "by_page", "said"),
    [
        ({}, True, None),
        ({}, False, "strategy no_buffer"),
        ({"disable_radix_cache": True}, False, None),
        ({"mamba_radix_cache_strategy": "no_buffer"}, True, "--mamba-radix-cache-strategy"),
        ({"mamba_track_interval": 100}, True, "--mamba-track-interval 100"),
    ],
)
def test_states_need_a_prefix_cache_that_keeps_them_by_page(states, monkeypatch, changes, by_page, said):
    monkeypatch.setattr(compat_layers, "_keeps_states_by_page", lambda *_: by_page)
    view = {"disable_radix_cache": False, "mamba_radix_cache_strategy": "auto", "mamba_track_interval": 256}
    view |= {"disable_hybrid_swa_memory": False, **changes}
    config = model_config("linear_attention", "full_attention")
    reasons = compat_layers.layer_reasons(SimpleNamespace(**view), config, PRESET)
    assert [said in reason for reason in reasons] == [True] * (said is not None)
