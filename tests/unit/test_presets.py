"""kvarn.presets: names and what they mean, the message for a wrong one, and what importing costs."""

import re
import subprocess
import sys
from collections.abc import Sequence

import pytest

import kvarn
from kvarn.errors import KVarNError, UnknownPreset
from kvarn.presets import PREFIX, PRESETS, get_preset, is_preset_name

MENU = ("k4v2_g128", "k4v4_g128", "k4v2_g64", "k4v4_g64", "k8v4_g128", "k4v3_g128", "k3v3_g128", "k2v2_g128")
IMPORT_LIMIT_SECONDS = 0.1


def test_menu_is_the_documented_one() -> None:
    assert tuple(PRESETS) == tuple(f"kvarn_{name}" for name in MENU)


@pytest.mark.parametrize("name", PRESETS)
def test_name_spells_the_widths(name: str) -> None:
    spelled = re.fullmatch(r"kvarn_k(\d)v(\d)_g(\d+)", name)
    assert spelled
    preset = get_preset(name)
    assert preset.name == name
    assert (preset.key_bits, preset.value_bits, preset.tile_tokens) == tuple(map(int, spelled.groups()))
    assert (preset.tail_tokens, preset.sink_tokens) == (128, 4)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("kvarn_k4v2_g12", "kvarn_k4v2_g128"),
        ("kvarn_k4v2_g65", "kvarn_k4v2_g64"),
        ("kvarn_k3v3", "kvarn_k3v3_g128"),
        ("kvarn_k8v8_g128", "kvarn_k8v4_g128"),
        ("KVARN_K2V2_G128", None),
        ("", None),
        ("fp8", None),
    ],
)
def test_unknown_name_gets_every_valid_one_and_the_nearest(wrong: str, nearest: str | None) -> None:
    with pytest.raises(UnknownPreset) as caught:
        get_preset(wrong)
    message = str(caught.value)
    assert repr(wrong) in message
    assert all(name in message for name in PRESETS)
    suggestion = re.search(r"Did you mean '(.*)'\?$", message)
    assert suggestion
    assert suggestion[1] in PRESETS
    assert nearest is None or suggestion[1] == nearest


def test_unknown_preset_can_be_caught_as_ours_and_as_a_value_error() -> None:
    assert issubclass(UnknownPreset, KVarNError)
    assert issubclass(UnknownPreset, ValueError)


def test_only_names_with_the_prefix_are_addressed_to_us() -> None:
    assert all(is_preset_name(name) for name in (*PRESETS, PREFIX + "nonsense"))
    assert not any(is_preset_name(name) for name in ("auto", "fp8_e5m2", "", None, 4, "a_kvarn_k4v2_g128"))


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PRESETS["kvarn_new"] = get_preset("kvarn_k4v2_g128")  # type: ignore[index]
    with pytest.raises(AttributeError):
        get_preset("kvarn_k4v2_g128").key_bits = 8  # type: ignore[misc]


def test_package_offers_what_it_lists() -> None:
    assert all(hasattr(kvarn, name) for name in kvarn.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", kvarn.__version__)


def in_fresh_python(lines: Sequence[str]) -> str:
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(
    "module", ["kvarn", "kvarn.env", "kvarn.errors", "kvarn.core.layout", "kvarn.core.capacity", "kvarn.core.support"]
)
def test_import_loads_neither_torch_nor_an_engine(module: str) -> None:
    loaded = in_fresh_python(["import sys", f"import {module}", "print(*sys.modules)"]).split()
    assert module in loaded
    assert not {"torch", "triton", "numpy", "sglang", "vllm", "transformers"} & set(loaded)


def test_import_is_quick() -> None:
    lines = ["import time", "begin = time.perf_counter()", "import kvarn", "print(time.perf_counter() - begin)"]
    assert min(float(in_fresh_python(lines)) for _ in range(5)) < IMPORT_LIMIT_SECONDS
