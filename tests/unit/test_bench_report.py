"""Tables and picture of docs/benchmarks.md: made from rows, honest about losses and about what was not measured."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest

from kvarn.bench.engines import CacheFacts
from kvarn.bench.picture import kl_of, picture
from kvarn.bench.planned import model_dtype, planned_tokens
from kvarn.bench.report import NOT_MEASURED, losing_cases, table, tables
from kvarn.bench.shapes import SHAPES
from kvarn.checkpoint import describe
from kvarn.cli.main import main

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SERVING = sorted(RESULTS.glob("serving-*.json"))
# Where the KL of a cache dtype is looked up, in this order.
QUALITY = [RESULTS / name for name in ("sglang-h100.json", "vllm-h100.json", "quality.json")]
PRESET = "kvarn_k4v2_g128"
# The model of the committed engine results, as its config.json says it.
QWEN2 = {"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 1536}


@pytest.mark.parametrize(("engine", "requests"), [("sglang", 64), ("vllm", None)])
def test_the_plan_beside_a_row_is_within_a_percent_of_what_engines_announced(engine: str, requests: int | None) -> None:
    rows = json.loads((RESULTS / f"{engine}-h100.json").read_text())["rows"]
    announced = {row["dtype"]: row["kv_tokens"] for row in rows}
    facts = CacheFacts(engine, "m", PRESET, announced[PRESET], longest=32768, requests=requests)
    model = describe({**QWEN2, "architectures": ["Qwen2ForCausalLM"]}, "float16")
    planned = planned_tokens(PRESET, model, facts, announced["float16"])
    assert planned == pytest.approx(announced[PRESET], rel=0.01)
    assert planned_tokens("fp8", model, facts, announced["float16"]) is None


@pytest.mark.parametrize("path", SERVING, ids=lambda path: path.stem)
def test_servers_held_what_was_planned_within_a_percent(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads(path.read_text())["rows"]
    for name, value in re.findall(r"\b(KVARN_\w+)=(\S+)", rows[0]["arguments"]):
        monkeypatch.setenv(name, value)
    planned = [row for row in rows if row["kv_tokens_planned"] is not None]
    for row in planned:
        shape, engine = SHAPES[row["model"]], row["engine"]
        facts = CacheFacts(
            engine, "m", row["dtype"], row["kv_tokens"], longest=shape["max_position_embeddings"],
            requests=64 if engine == "sglang" else None,
        )  # fmt: skip
        baseline = next(other["kv_tokens"] for other in rows if other["dtype"] == "auto")
        assert row["kv_tokens_planned"] == planned_tokens(row["dtype"], describe(shape, "bfloat16"), facts, baseline)
        assert row["kv_tokens"] == pytest.approx(row["kv_tokens_planned"], rel=0.01)
    recurrent = "qwen3-next" in path.stem
    assert bool(planned) != recurrent


def test_nothing_is_planned_where_nothing_should_fit() -> None:
    model = describe({**QWEN2, "architectures": ["Qwen2ForCausalLM"]}, "float16")
    facts = CacheFacts("sglang", "m", PRESET, 2048, longest=2048, requests=64)
    assert planned_tokens(PRESET, model, facts, 2048) is None


def test_the_last_dtype_of_a_command_is_the_models() -> None:
    assert model_dtype(["--dtype", "float32", "--dtype", "half"]) == "float16"
    assert model_dtype(["--kv-cache-dtype", "float32"]) is None


def row(dtype: str, workload: str = "burst", **more: object) -> dict[str, object]:
    named = {"engine": "vllm", "model": "m", "weights": "dummy", "gpu": "H100"}
    setting = {**named, "scale": 1.0, "arguments": "--x 1"}
    figures = {"ttft_p50_ms": 10.0, "ttft_p99_ms": 20.0, "itl_p50_ms": 3.0, "itl_p99_ms": 4.0}
    capacity = {"kv_tokens": 1000, "kv_tokens_planned": None, "capacity_ratio": 1.0, "tok_s": 50.0, "tok_s_ratio": 1.0}
    counted = {"slope_us_per_ktoken": None, "hit_rate": 0.5, "preemptions": 2}
    return {**setting, "dtype": dtype, "workload": workload, **capacity, **figures, **counted, **more}


def test_a_table_has_the_baseline_first_and_every_figure() -> None:
    figures = {"capacity_ratio": 4.5, "tok_s": 99.0, "tok_s_ratio": 1.98, "slope_us_per_ktoken": 7.125}
    ours = row(PRESET, kv_tokens=4500, kv_tokens_planned=4498, **figures)
    made = table([ours, row("auto")])
    assert "### vllm, m with random weights, burst, H100, `--x 1`" in made
    assert f"| **`{PRESET}`** | 4,500 (4,498) | 4.50 | 99.0 | 1.98 | 10 / 20 | 3.00 / 4.00 | 7.12 | 50.0% | 2 |" in made
    assert made.index("| `auto` | 1,000 |") < made.index(PRESET)


def test_every_figure_of_a_preset_that_is_worse_than_another_caches_is_listed() -> None:
    worse = row(PRESET, "short", tok_s=40.0, itl_p50_ms=3.5)
    lost = losing_cases([row("auto", "short"), worse, row(PRESET), row("auto"), row("fp8", tok_s=60.0)])
    assert [line.rpartition("`: ")[2] for line in lost] == [
        "50 tokens/s against 60",
        "40 tokens/s against 50, 3.5 ms between tokens (p50) against 3.0",
    ]
    assert "short" in lost[1]
    assert f"- {lost[1]}" in tables([row("auto", "short"), worse])
    assert "Nowhere" in tables([row("auto"), row(PRESET)])


def test_a_steeper_slope_is_a_loss_too() -> None:
    rows = [row("auto", "slope-1", slope_us_per_ktoken=1.0), row(PRESET, "slope-1", slope_us_per_ktoken=2.0)]
    assert losing_cases(rows)[0].endswith("2.0 us per 1,000 tokens of context against 1.0")


def test_rows_at_another_scale_are_in_no_document() -> None:
    small = [row("auto", scale=0.02), row(PRESET, scale=0.02)]
    assert tables(small) == NOT_MEASURED
    assert "not measured yet" in picture(small)
    assert "scale 0.02" in table(small)


def test_kl_is_that_of_the_first_row_which_tells_it() -> None:
    rows = [{"dtype": PRESET}, {"dtype": PRESET, "kl_mean": 0.003}, {"method": PRESET, "kl_mean": 0.5}]
    rows.append({"method": "fp8-e4m3", "kl_mean": 0.001})
    assert [kl_of(dtype, rows) for dtype in (PRESET, "fp8", "fp8_e4m3", "auto")] == [0.003, 0.001, 0.001, None]


def test_picture_places_throughput_over_capacity_and_tells_kl() -> None:
    ours = row(PRESET, capacity_ratio=4.5, tok_s_ratio=2.0)
    rows = [
        row("auto"),
        ours,
        row("fp8", capacity_ratio=2.0),
        row("auto", "short"),
        {"dtype": PRESET, "kl_mean": 0.003},
    ]
    root = xml.etree.ElementTree.fromstring(picture(rows))
    circles = {c[0].text: c for c in root.iter() if c.tag.endswith("circle") and len(c)}
    assert set(circles) == {"auto", "fp8", f"{PRESET}, KL 0.0030"}
    places = [(float(c.get("cx", "")), -float(c.get("cy", ""))) for c in circles.values()]
    assert max(places) == places[1]
    assert places[0][1] == places[2][1] < places[1][1]
    assert places[0][0] < places[2][0]


def test_document_and_picture_are_made_from_the_committed_rows(tmp_path: Path) -> None:
    document = (ROOT / "docs" / "benchmarks.md").read_text()
    copy = tmp_path / "benchmarks.md"
    copy.write_text(document)
    assert main(["plot", *map(str, [*SERVING, *QUALITY]), str(copy)]) == 0
    assert copy.read_text() == document
    assert copy.with_suffix(".svg").read_text() == (ROOT / "docs" / "benchmarks.svg").read_text()


def test_a_document_of_serving_gets_the_tables_of_serving(tmp_path: Path) -> None:
    document = tmp_path / "d.md"
    document.write_text((ROOT / "docs" / "benchmarks.md").read_text())
    file = tmp_path / "serving-x.json"
    file.write_text(json.dumps({"provenance": {}, "rows": [row("auto"), row(PRESET, "burst", tok_s=40.0)]}))
    assert main(["plot", str(file), str(tmp_path / "missing.json"), str(document)]) == 0
    assert "### Where KVarN is slower\n\n- vllm" in document.read_text()
