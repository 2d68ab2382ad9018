"""core.layers: what a configuration says about every layer, as transformers states it and as checkpoints do."""

from types import SimpleNamespace

import pytest

from kvarn.core.layers import LayerKind, count, layer_kinds, summary, window_tokens

TILES, MODEL_DTYPE, RECURRENT = LayerKind.TILES, LayerKind.MODEL_DTYPE, LayerKind.RECURRENT
NO_CACHE, UNKNOWN = LayerKind.NO_CACHE, LayerKind.UNKNOWN
GEMMA_3 = [*[MODEL_DTYPE] * 5, TILES] * 3
QWEN_3_NEXT = [*[RECURRENT] * 3, TILES] * 2

# What config.json says, and the kinds of the layers.
CONFIGURATIONS = {
    "llama": ({"model_type": "llama", "num_hidden_layers": 2}, [TILES] * 2),
    "gemma-3, types": (
        {
            "num_hidden_layers": 18,
            "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
            "sliding_window": 512,
        },
        GEMMA_3,
    ),
    "gemma-3, period": (
        {"model_type": "gemma3_text", "num_hidden_layers": 18, "sliding_window_pattern": 6, "sliding_window": 512},
        GEMMA_3,
    ),
    "gemma-3, default period": ({"model_type": "gemma3_text", "num_hidden_layers": 18, "sliding_window": 512}, GEMMA_3),
    "gemma-3n, shared caches": (
        {"model_type": "gemma3n_text", "num_hidden_layers": 10, "sliding_window": 512, "num_kv_shared_layers": 3},
        [*[MODEL_DTYPE] * 4, TILES, *[MODEL_DTYPE] * 2, *[UNKNOWN] * 3],
    ),
    "qwen3-next": ({"model_type": "qwen3_next", "num_hidden_layers": 8, "full_attention_interval": 4}, QWEN_3_NEXT),
    "qwen3-next, default period": ({"model_type": "qwen3_next", "num_hidden_layers": 8}, QWEN_3_NEXT),
    "qwen3.5": (
        {
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 8,
            "full_attention_interval": 4,
            "layer_types": [*["linear_attention"] * 3, "full_attention"] * 2,
        },
        QWEN_3_NEXT,
    ),
    "gpt-oss": (
        {"num_hidden_layers": 4, "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2},
        [MODEL_DTYPE, TILES] * 2,
    ),
    "mistral with a window": (
        {"model_type": "mistral", "num_hidden_layers": 3, "sliding_window": 4096},
        [MODEL_DTYPE] * 3,
    ),
    "mistral without": ({"model_type": "mistral", "num_hidden_layers": 3, "sliding_window": None}, [TILES] * 3),
    "qwen2, window unused": (
        {"num_hidden_layers": 3, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1},
        [TILES] * 3,
    ),
    "qwen2, window used": (
        {"num_hidden_layers": 3, "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 1},
        [TILES, MODEL_DTYPE, MODEL_DTYPE],
    ),
    "llama-4": (
        {"model_type": "llama4_text", "num_hidden_layers": 4, "attention_chunk_size": 8192},
        [*[MODEL_DTYPE] * 3, TILES],
    ),
    "exaone": (
        {"num_hidden_layers": 6, "sliding_window": 4096, "sliding_window_pattern": "LLLG"},
        [*[MODEL_DTYPE] * 3, TILES, MODEL_DTYPE, TILES],
    ),
    "nemotron-h": (
        {"num_hidden_layers": 5, "hybrid_override_pattern": "M-M*E"},
        [RECURRENT, NO_CACHE, RECURRENT, TILES, NO_CACHE],
    ),
    "jamba": (
        {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2},
        [RECURRENT, RECURRENT, TILES, RECURRENT] * 2,
    ),
    "bamba": ({"num_hidden_layers": 4, "attn_layer_indices": [1]}, [RECURRENT, TILES, RECURRENT, RECURRENT]),
    "lfm2": (
        {"num_hidden_layers": 3, "layer_types": ["conv", "conv", "full_attention"]},
        [RECURRENT, RECURRENT, TILES],
    ),
    "attention and a state in one layer": (
        {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]},
        [RECURRENT, UNKNOWN],
    ),
    "sparse": ({"num_hidden_layers": 1, "layer_types": ["indexed_attention"]}, [UNKNOWN]),
}


@pytest.mark.parametrize(("config", "kinds"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_kinds_are_those_of_the_configuration_as_mapping_and_as_object(config, kinds):
    assert list(layer_kinds(config)) == kinds
    assert list(layer_kinds(SimpleNamespace(**config))) == kinds


# Class of transformers' configuration, what a checkpoint adds, and layers in tiles, model dtype and recurrent.
TRANSFORMERS = {
    "gemma-3": ("Gemma3TextConfig", {"num_hidden_layers": 18, "sliding_window": 512}, (3, 15, 0)),
    "qwen3-next": ("Qwen3NextConfig", {"num_hidden_layers": 48}, (12, 0, 36)),
    "qwen3.5": ("Qwen3_5TextConfig", {"num_hidden_layers": 32}, (8, 0, 24)),
    "gpt-oss": ("GptOssConfig", {"num_hidden_layers": 24}, (12, 12, 0)),
    "llama": ("LlamaConfig", {"num_hidden_layers": 32}, (32, 0, 0)),
    "mistral": ("MistralConfig", {"sliding_window": 4096}, (0, 32, 0)),
    "mistral without a window": ("MistralConfig", {"sliding_window": None}, (32, 0, 0)),
    "qwen2": ("Qwen2Config", {}, (32, 0, 0)),
    "jamba": ("JambaConfig", {}, (4, 0, 28)),
    "nemotron-h": ("NemotronHConfig", {"hybrid_override_pattern": "M-M*E"}, (1, 0, 2)),
}


@pytest.mark.parametrize(("name", "options", "numbers"), TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_configurations_of_transformers_and_what_they_are_saved_as_say_the_same(name, options, numbers):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name)(**options)
    for found in (layer_kinds(config), layer_kinds(config.to_dict())):
        assert tuple(count(found, kind) for kind in (TILES, MODEL_DTYPE, RECURRENT)) == numbers


def test_window_is_that_which_is_used():
    assert window_tokens({"sliding_window": 512}) == 512
    assert window_tokens({"sliding_window": 512, "use_sliding_window": False}) == 0
    assert window_tokens({"attention_chunk_size": 8192}) == 8192
    assert window_tokens({"sliding_window": None}) == 0


def test_summary_leaves_out_what_there_is_none_of():
    assert summary([TILES] * 3 + [MODEL_DTYPE] * 15) == "3 in tiles, 15 in model dtype"
    assert summary([TILES, RECURRENT]) == "1 in tiles, 1 with a recurrent state"
