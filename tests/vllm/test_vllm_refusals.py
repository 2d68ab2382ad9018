"""What KVarN can't serve is refused before weights are loaded: every reason in one message, each with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_process import Models
from serving import DTYPE, serving
from tiny_models import LLAMA_GROUP_3

from kvarn.errors import UnsupportedConfig
from kvarn.presets import PRESETS

BLOCK_SIZE = "--block-size 64 is not a multiple of the tile of 128 tokens; leave the flag out."
SKIPPED_LAYERS = "--kv-cache-dtype-skip-layers can't be used, because a cache of two dtypes has blocks that no tile"
FLAGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "block size": ({"block_size": 64}, [BLOCK_SIZE]),
    "skipped layers": ({"kv_cache_dtype_skip_layers": ["0"]}, [SKIPPED_LAYERS]),
    "both": ({"block_size": 64, "kv_cache_dtype_skip_layers": ["0"]}, [BLOCK_SIZE, SKIPPED_LAYERS]),
    "match unit": (
        {"prefix_match_unit": 64},
        ["--prefix-match-unit 64 is not a multiple of the tile of 128 tokens; leave it out."],
    ),
    "offloading": (
        {"kv_offloading_size": 1.0},
        ["moves the cache through a KV connector", "--kv-offloading-size can't be used"],
    ),
    "fast prefill": ({"kv_sharing_fast_prefill": True}, ["--kv-sharing-fast-prefill can't be used"]),
    "attention backend": ({"attention_backend": "CPU_ATTN"}, ["--attention-backend can't be used"]),
    "one kind of cache": (
        {"disable_hybrid_kv_cache_manager": True},
        ["--disable-hybrid-kv-cache-manager can't be used"],
    ),
    "pooling": ({"runner": "pooling"}, ["does not generate text here"]),
}
# Changes to the configuration of the tiny Llama, and what is said about the first layer that results.
CONFIGURATIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "sliding window": (
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64},
        ["The model MistralForCausalLM has no layer that attends to the whole context, and only those are cached in"],
    ),
    "head width": ({"head_dim": 80}, ["The model's head_dim 80 has no tile layout (there is one for 64, 96, 128"]),
}


@pytest.fixture(autouse=True)
def fresh_selection() -> None:
    """Forget which backends were chosen in this process, as if there had been no engine yet."""
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note every model whose weights are loaded."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    seen: list[str] = []
    load_weights = DefaultModelLoader.load_weights

    def watched(loader: Any, model: Any, model_config: Any) -> None:
        seen.append(model_config.model)
        load_weights(loader, model, model_config)

    monkeypatch.setattr(DefaultModelLoader, "load_weights", watched)
    return seen


def _refusal(model: Path, **options: Any) -> str:
    with pytest.raises(UnsupportedConfig) as refused, serving(model, **options):
        pass
    return str(refused.value)


def _listed(message: str) -> list[str]:
    """Return the reasons of a message."""
    head, *reasons = message.split("\n  - ")
    assert head == "KVarN can't serve this configuration:"
    return reasons


def _assert_reasons(message: str, beginnings: list[str]) -> None:
    """Assert that a message lists these reasons and no others, each with what to do."""
    reasons = _listed(message)
    assert len(reasons) == len(beginnings)
    for reason, beginning in zip(reasons, beginnings, strict=True):
        assert beginning in reason
        assert reason.rpartition("; ")[2].startswith(("leave ", "serve it with --kv-cache-dtype auto"))


@pytest.mark.parametrize("case", FLAGS, ids=lambda case: case.replace(" ", "-"))
def test_flag_is_refused(models: Models, loaded: list[str], case: str) -> None:
    options, beginnings = FLAGS[case]
    _assert_reasons(_refusal(models.path(LLAMA_GROUP_3), **options), beginnings)
    assert loaded == []


@pytest.mark.parametrize("case", CONFIGURATIONS, ids=lambda case: case.replace(" ", "-"))
def test_model_is_refused(models: Models, loaded: list[str], tmp_path: Path, case: str) -> None:
    changes, beginnings = CONFIGURATIONS[case]
    config = json.loads((models.path(LLAMA_GROUP_3) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    _assert_reasons(_refusal(tmp_path), beginnings)
    assert loaded == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"method": "suffix"}, "because drafts must be one chain, made token by token: a rejected branch could not be"),
        ({"parallel_drafting": True}, "because drafts must be one chain"),
        ({"num_speculative_tokens": 64}, "because a request's rows of one step would no longer be few"),
        ({"kv_cache_dtype": DTYPE}, "because a draft model's cache has no exact tail"),
    ],
    ids=["branches", "parallel", "many", "tiles"],
)
def test_drafter_is_refused(changes: dict[str, Any], why: str) -> None:
    """Those that this vLLM refuses first, or has no packages for, or that would load numba beside other engines."""
    from kvarn.vllm_backend.resolution import draft_reasons

    served = {"method": "eagle", "parallel_drafting": False, "num_speculative_tokens": 4, "kv_cache_dtype": None}
    assert draft_reasons(SimpleNamespace(**served), 128, hybrid=False, windows=False) == []
    (reason,) = draft_reasons(SimpleNamespace(**served | changes), 128, hybrid=False, windows=False)
    assert why in reason
    assert "; leave " in reason


def test_drafter_is_refused_beside_recurrent_layers() -> None:
    from kvarn.vllm_backend.resolution import draft_reasons

    drafter = SimpleNamespace(method="eagle", parallel_drafting=False, num_speculative_tokens=4, kv_cache_dtype=None)
    (reason,) = draft_reasons(drafter, 128, hybrid=True, windows=False)
    assert "can't be used with a model that has linear-attention or Mamba layers" in reason
    assert draft_reasons(None, 128, hybrid=True, windows=True) == []


def test_draft_model_is_refused_beside_windows() -> None:
    from kvarn.vllm_backend.resolution import draft_reasons

    served = {"parallel_drafting": False, "num_speculative_tokens": 4, "kv_cache_dtype": None}
    (reason,) = draft_reasons(SimpleNamespace(method="eagle", **served), 128, hybrid=False, windows=True)
    assert "can't be used with a model that has sliding-window layers" in reason
    assert draft_reasons(SimpleNamespace(method="ngram", **served), 128, hybrid=False, windows=True) == []


def test_unknown_preset_is_refused_by_vllm_which_lists_ours(models: Models, loaded: list[str]) -> None:
    unknown = serving(models.path(LLAMA_GROUP_3), kv_cache_dtype="kvarn_k9v9_g128")
    with pytest.raises(ValueError, match="kvarn_k9v9_g128") as refused, unknown:
        pass
    for name in ("auto", "fp8", *PRESETS):
        assert f"'{name}'" in str(refused.value)
    assert loaded == []


@pytest.mark.parametrize("case", ["skipped layers", "pooling"], ids=lambda case: case.replace(" ", "-"))
def test_refusal_also_comes_after_an_engine_that_was_served(models: Models, loaded: list[str], case: str) -> None:
    """vLLM selects a backend once a process for all layers that look alike."""
    with serving(models.path(LLAMA_GROUP_3)):
        assert len(loaded) == 1
    options, beginnings = FLAGS[case]
    _assert_reasons(_refusal(models.path(LLAMA_GROUP_3), **options), beginnings)
    assert len(loaded) == 1


def test_engine_has_its_own_preset_whatever_was_served_before(models: Models) -> None:
    """As before: a third engine that looks like the first is not asked about."""
    for preset in (DTYPE, "kvarn_k8v4_g128", DTYPE):
        with serving(models.path(LLAMA_GROUP_3), kv_cache_dtype=preset) as engine:
            assert engine.tail.shape.preset.name == preset
