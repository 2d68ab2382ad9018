"""Workloads of `kvarn bench serve`: what they become, the slope, and model shapes without weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from kvarn.bench.shapes import write_checkpoint
from kvarn.bench.workloads import WORKLOADS, named, runs, slope
from kvarn.checkpoint import describe, read_config
from kvarn.core.support import DeviceFacts, unsupported_reasons
from kvarn.errors import KVarNError
from kvarn.presets import get_preset
from kvarn.sglang_backend.compat_tables import BESIDE_TILES

LONGEST = 129 * 1024


def test_slope_of_a_line_is_its_slope_in_us_per_thousand_tokens() -> None:
    contexts = [1024, 4096, 16384]
    assert slope(contexts, [7 + 0.002 * tokens for tokens in contexts]) == pytest.approx(2000)
    assert slope([1000, 2000, 3000], [1.0, 3.0, 2.0]) == pytest.approx(500)


@pytest.mark.parametrize("capacity", [100_001, 350_000])
def test_burst_is_twice_what_the_baseline_holds(capacity: int) -> None:
    (run,) = runs(WORKLOADS["burst"], 1, capacity, LONGEST)
    assert (run.input_tokens, run.output_tokens) == (16384, 1024)
    assert run.requests == math.ceil(2 * capacity / 17408)


def test_replay_keeps_three_times_what_the_baseline_holds_in_shared_prefixes() -> None:
    (run,) = runs(WORKLOADS["replay"], 1, 350_000, LONGEST)
    assert run.sessions * run.prefix_tokens >= 3 * 350_000 > (run.sessions - 1) * run.prefix_tokens
    assert run.requests == 4 * run.sessions


@pytest.mark.parametrize("name", sorted({name.rpartition("-")[0] for name in WORKLOADS if name.startswith("chat")}))
def test_chats_have_the_lengths_of_their_names_and_come_at_a_rate(name: str) -> None:
    for workload in (found for key, found in WORKLOADS.items() if key.startswith(name)):
        (run,) = runs(workload, 1, 350_000, LONGEST)
        assert workload.name == f"chat-{run.input_tokens}-{run.output_tokens}"
        assert run.rate == 8


def test_a_slope_takes_the_contexts_that_fit_model_and_baseline() -> None:
    def contexts(name: str, capacity: int, longest: int) -> list[int]:
        return [run.input_tokens // 1024 for run in runs(WORKLOADS[name], 1, capacity, longest)]

    assert contexts("slope-1", 350_000, LONGEST) == [1, 4, 16, 32, 64, 128]
    assert contexts("slope-1", 350_000, 40960) == [1, 4, 16, 32]
    assert contexts("slope-8", 350_000, LONGEST) == [1, 4, 16, 32]
    with pytest.raises(KVarNError, match="1 fit"):
        contexts("slope-8", 20_000, LONGEST)


def test_what_is_too_long_for_the_model_is_refused_before_it_is_sent() -> None:
    with pytest.raises(KVarNError, match="17408 tokens"):
        runs(WORKLOADS["burst"], 1, 100_000, 16384)


def test_a_small_scale_makes_every_workload_small_enough_for_seconds() -> None:
    for workload in WORKLOADS.values():
        for run in runs(workload, 0.02, 3000, 2048):
            assert run.input_tokens + run.output_tokens < 2048
            assert run.requests * run.output_tokens <= 1024


@pytest.mark.parametrize("name", ["burst", "replay"])
def test_at_any_scale_a_load_from_the_capacity_is_more_than_it(name: str) -> None:
    (run,) = runs(WORKLOADS[name], 0.02, 3000, 2048)
    assert run.requests * (run.input_tokens + run.output_tokens) > 2 * 3000


def test_prompts_of_no_two_runs_have_the_same_seed() -> None:
    seeds = [run.seed for workload in WORKLOADS.values() for run in runs(workload, 1, 350_000, LONGEST)]
    assert len(set(seeds)) == len(seeds)


def test_names_stand_for_workloads_once() -> None:
    assert [workload.name for workload in named("short,slope,slope-8")] == ["short", "slope-1", "slope-8"]
    assert named("all") == list(WORKLOADS.values())
    with pytest.raises(KVarNError, match="'nothing'.*burst"):
        named("nothing")


@pytest.mark.parametrize(
    ("name", "layers", "bytes_a_token"),
    [("qwen3-8b", 36, 147456), ("qwen3-32b", 64, 262144), ("deepseek-v2-lite", 27, 31104), ("qwen3-next", 12, 24576)],
)
def test_a_shape_is_a_checkpoint_that_can_be_planned_and_served(
    tmp_path: Path, name: str, layers: int, bytes_a_token: int
) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in ("tokenizer_config.json", "config.json", "model.safetensors.index.json", "a.bin"):
        (tokenizer / file).write_text("{}")
    write_tokenizer(tokenizer, 151_000)
    made = write_checkpoint(name, tokenizer, tmp_path)
    assert sorted(path.name for path in made.iterdir()) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    found = describe(read_config(str(made)))
    preset, device = get_preset("kvarn_k4v2_g128"), DeviceFacts("cuda")
    assert not unsupported_reasons(found.facts, preset, device, BESIDE_TILES, latents=True)
    assert found.tile_layers == layers
    rows = sum(found.facts.latent_dims) if found.facts.latent_dims else found.kv_heads * 2 * found.facts.head_dim
    assert found.tile_layers * rows * found.raw_bytes == bytes_a_token


def write_tokenizer(folder: Path, tokens: int) -> None:
    vocabulary = {str(number): number for number in range(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))


def test_a_shape_without_a_tokenizer_of_its_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KVarNError, match=r"no tokenizer.json"):
        write_checkpoint("qwen3-8b", tmp_path, tmp_path)
    write_tokenizer(tmp_path, 49_152)
    with pytest.raises(KVarNError, match="has 49152 tokens"):
        write_checkpoint("qwen3-8b", tmp_path, tmp_path)
