"""The command line of `kvarn bench serve`: what reaches the servers, and what is refused before one is started."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from kvarn import env
from kvarn.bench.engines import ENGINES
from kvarn.bench.runner import Bench
from kvarn.cli.main import main

SERVE = ["bench", "serve", "--engine", "vllm", "--out", "rows.json"]


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> list[Bench]:
    """What would have been run, in an environment that asks for nothing."""
    for mode in env.modes():
        monkeypatch.delenv(mode.partition("=")[0])
    found: list[Bench] = []

    def run(self: Bench, _dtypes: object, _workloads: object) -> list[object]:
        assert (Path(self.model) / "config.json").is_file()
        return found.append(self) or []

    monkeypatch.setattr(Bench, "run", run)
    monkeypatch.setattr("kvarn.bench.server.exit_on_signals", lambda: None)
    return found


def model_in(folder: Path, tokens: int = 0) -> str:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 128}
    (folder / "config.json").write_text(json.dumps(sizes))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": dict.fromkeys(map(str, range(tokens)), 0)}}))
    return str(folder)


def test_engine_arguments_reach_every_server_and_name_the_setting(tmp_path: Path, benches: list[Bench]) -> None:
    chosen = ["--model", model_in(tmp_path), "--dtypes", "auto", "--workload", "short", "--scale", "0.5"]
    assert main([*SERVE, *chosen, "--", "--max-num-seqs", "64", "--chat-template", "/somewhere/t.jinja"]) == 0
    (bench,) = benches
    assert bench.arguments == ("--max-num-seqs", "64", "--chat-template", "/somewhere/t.jinja")
    assert bench.setting.arguments == "--max-num-seqs 64 --chat-template t.jinja"
    assert (bench.setting.weights, bench.setting.scale, bench.setting.model) == ("real", 0.5, tmp_path.name)


def test_rows_are_found_only_where_the_environment_asks_for_the_same_cache(
    tmp_path: Path, benches: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ["--model", model_in(tmp_path), "--dtypes", "auto", "--workload", "short", "--", "--seed", "1"]
    assert main([*SERVE, *chosen]) == 0
    monkeypatch.setenv("KVARN_ROPE_BITS", "8")
    assert main([*SERVE, *chosen]) == 0
    before, after = (bench.setting for bench in benches)
    assert (before.arguments, after.arguments) == ("--seed 1", "KVARN_ROPE_BITS=8 --seed 1")
    assert not after.has(asdict(before))


def test_a_shape_is_served_with_random_weights(tmp_path: Path, benches: list[Bench]) -> None:
    chosen = ["--shape", "qwen3-8b", "--tokenizer", model_in(tmp_path, 151_000)]
    assert main([*SERVE, *chosen, "--dtypes", "auto", "--workload", "short"]) == 0
    (bench,) = benches
    assert bench.arguments == ("--load-format", "dummy")
    assert (bench.setting.weights, bench.setting.model, Path(bench.model).name) == ("dummy", "qwen3-8b", "qwen3-8b")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--workload", "short"], "either a model"),
        (["--workload", "short", "--model", "m", "--shape", "qwen3-8b"], "either a model"),
        (["--workload", "short", "--shape", "qwen3-9b"], "no shape 'qwen3-9b'"),
        (["--workload", "short", "--shape", "qwen3-8b"], "no tokenizer"),
        (["--workload", "long", "--model", "m"], "no workload 'long'"),
        (["--workload", "short", "--model", "m", "--scale", "0"], "--scale 0"),
    ],
)
def test_what_makes_no_sense_is_refused(
    benches: list[Bench], capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    assert main([*SERVE, "--dtypes", "auto", *arguments]) == 1
    assert word in capsys.readouterr().err
    assert not benches


@pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.name)
def test_a_server_gets_no_flag_of_kvarn_but_the_cache_dtype(engine) -> None:
    commands = [engine.command("m", dtype, "h", 1, cuda=True) for dtype in ("auto", "kvarn_k4v2_g128")]
    assert [word for word in commands[1] if "kvarn" in word] == ["kvarn_k4v2_g128"]
    assert commands[0] == ["auto" if word == "kvarn_k4v2_g128" else word for word in commands[1]]
