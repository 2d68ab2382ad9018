"""What KVarN asks of vLLM itself: a version of the table, its signatures, and settings by their real names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine_process import Models
from tiny_models import LLAMA_GROUP_3

from kvarn.errors import EngineIncompatible
from kvarn.limits import Limit
from kvarn.vllm_backend import compat
from kvarn.vllm_backend.compat_tables import RECOMMENDED_VERSION, SELECTOR_FLAGS, TESTED_VERSIONS
from kvarn.vllm_backend.resolution import LIMITS, reasons_against

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KNOWN_BY_OTHER_NAMES = {"use_mla", "has_sink", "has_sliding_window"}
NOT_FLAGS = {"head_size", "dtype", "kv_cache_dtype", "block_size", "attn_type"}
TARGET = "vllm.v1.attention.backend.AttentionMetadataBuilder.build"


@pytest.fixture(scope="module")
def config(models: Models) -> VllmConfig:
    """The configuration of a model with a kvarn dtype and no other flag."""
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(str(models.path(LLAMA_GROUP_3)), kv_cache_dtype="kvarn_k4v2_g128", skip_tokenizer_init=True)
    return args.create_engine_config()


def test_installed_vllm_is_one_of_the_table() -> None:
    compat.require_compatible()


def test_unknown_version_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "engine_version", lambda: "0.99.1")
    with pytest.raises(EngineIncompatible) as refused:
        compat.require_compatible()
    message = str(refused.value)
    assert f"is tested with vLLM {' and '.join(TESTED_VERSIONS)}." in message
    assert "vLLM 0.99.1 is not among them." in message
    assert f"pip install vllm=={RECOMMENDED_VERSION}" in message
    assert "KVARN_ALLOW_UNTESTED_ENGINE=1" in message


def test_unknown_version_is_accepted_on_request_if_its_signatures_match(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "engine_version", lambda: "0.99.1")
    monkeypatch.setenv("KVARN_ALLOW_UNTESTED_ENGINE", "1")
    compat.require_compatible()
    assert "was not tested with vLLM 0.99.1; accepted on request" in caplog.text


def test_local_version_of_a_build_is_no_other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "engine_version", lambda: "0.32.0+cpu")
    compat.require_compatible()


def _reported(monkeypatch: pytest.MonkeyPatch, build: Any) -> str:
    from vllm.v1.attention.backend import AttentionMetadataBuilder

    assert f"{AttentionMetadataBuilder.__module__}.{AttentionMetadataBuilder.__name__}.build" == TARGET
    if build is None:
        monkeypatch.delattr(AttentionMetadataBuilder, "build")
    else:
        monkeypatch.setattr(AttentionMetadataBuilder, "build", build)
    # Someone who accepts any version relies on the signatures.
    monkeypatch.setenv("KVARN_ALLOW_UNTESTED_ENGINE", "1")
    with pytest.raises(EngineIncompatible) as refused:
        compat.require_compatible()
    return str(refused.value)


def test_removed_parameter_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    message = _reported(monkeypatch, lambda self, common_attn_metadata: None)
    assert f"{TARGET} no longer takes common_prefix_len, fast_build" in message


def test_removed_function_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{TARGET} does not exist" in _reported(monkeypatch, None)


def test_new_required_parameter_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(
        self: Any, common_prefix_len: int, common_attn_metadata: Any, plan: Any, fast_build: bool = False
    ) -> None:
        pass

    message = _reported(monkeypatch, build)
    assert TARGET in message
    assert "plan" in message


def _walk(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.flag)
def test_limit_names_a_setting_that_vllm_has(config: VllmConfig, limit: Limit) -> None:
    """A misspelt one would never refuse anything."""
    _walk(config, limit.path)
    assert limit.reason(config) is None


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.flag)
def test_limit_refuses_what_switches_its_setting_on(config: VllmConfig, limit: Limit) -> None:
    """The least of it: True for a switch, two for a size that is one, one for what is off at None or 0."""
    off = _walk(config, limit.path)
    switched: Any = True if off is False else (off or 0) + 1
    for name in reversed(limit.path.split(".")):
        switched = SimpleNamespace(**{name: switched})
    reason = limit.reason(switched)
    assert reason is not None
    assert reason.startswith(f"{limit.flag} can't be used, because ")


def test_every_flag_of_the_selector_is_known() -> None:
    from vllm.v1.attention.selector import AttentionSelectorConfig

    assert set(AttentionSelectorConfig._fields) - NOT_FLAGS == {*SELECTOR_FLAGS, *KNOWN_BY_OTHER_NAMES}


def test_batch_invariance_is_served_where_the_order_is_fixed(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.attention.selector import AttentionSelectorConfig

    asked = AttentionSelectorConfig(64, torch.float32, "kvarn_k4v2_g128", None)._replace(use_batch_invariant=True)
    monkeypatch.setenv("KVARN_CANONICAL", "1")
    assert len(reasons_against(asked._asdict(), config, None)) == 1
    monkeypatch.setenv("KVARN_BATCH_INVARIANT", "1")
    assert reasons_against(asked._asdict(), config, None) == []


# Latents and learned sinks are served; which of them, the model tells.
@pytest.mark.parametrize("flag", sorted({*SELECTOR_FLAGS, *KNOWN_BY_OTHER_NAMES} - {"use_mla", "has_sink"}))
def test_flag_of_the_selector_is_refused(config: VllmConfig, flag: str) -> None:
    from vllm.v1.attention.selector import AttentionSelectorConfig

    plain = AttentionSelectorConfig(64, torch.float32, "kvarn_k4v2_g128", None)
    assert reasons_against(plain._asdict(), config, None) == []
    assert len(reasons_against(plain._replace(**{flag: True})._asdict(), config, None)) == 1
