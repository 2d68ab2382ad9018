"""What `kvarn bench serve` asks of the engines' clients and servers, and how it reads what they say.

The samples in bench_samples/ were written by the clients and servers themselves, SGLang 0.5.23 and vLLM 0.32.0, serving
SmolLM2-135M-Instruct on a CPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvarn.bench.engines import ENGINES, ClientReport, Counters, total
from kvarn.bench.sanity import InsaneResult, check_cached, check_report
from kvarn.bench.server import ServerError
from kvarn.bench.workloads import WORKLOADS, Run, runs

HERE = Path(__file__).parent
SAMPLES = HERE / "bench_samples"
SGLANG, VLLM = ENGINES["sglang"], ENGINES["vllm"]
PLAIN = Run(64, 8, 3, rate=0, concurrency=2, prefix_tokens=0, sessions=0, seed=7)
# What wrote each sample: tokens in and out, and requests.
REPORTS = [
    (SGLANG, "sglang-random.json", (819, 51, 5)),
    (SGLANG, "sglang-shared.json", (426, 6, 60)),
    (VLLM, "vllm-random.json", (328, 20, 17)),
    (VLLM, "vllm-shared.json", (180, 4, 208)),
]
REPORT = ClientReport(3, 24, 1.0, 1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(("engine", "sample", "asked"), REPORTS, ids=[sample for _, sample, _ in REPORTS])
def test_what_a_client_wrote_is_read(engine, sample, asked):
    said = json.loads((SAMPLES / sample).read_text())
    report = engine.report(SAMPLES / sample)
    tokens_in, tokens_out, requests = asked
    check_report(report, replace(PLAIN, input_tokens=tokens_in, output_tokens=tokens_out, requests=requests))
    assert report.output_tokens / report.duration_s == pytest.approx(said["output_throughput"])
    assert report.ttft_p50_ms <= report.ttft_p99_ms
    assert report.itl_p50_ms <= report.itl_p99_ms


@pytest.mark.parametrize("written", ["", "no JSON", '{"completed": 3}'])
def test_a_client_that_wrote_something_else_is_named(tmp_path, written):
    out = tmp_path / "out.json"
    out.write_text(written)
    with pytest.raises(ServerError, match="client of sglang left no figures"):
        SGLANG.report(out)


@pytest.mark.parametrize(
    ("report", "word"),
    [
        (replace(REPORT, completed=2), "2 of 3 requests"),
        (replace(REPORT, output_tokens=23), "23 output tokens came of 24"),
        (replace(REPORT, output_tokens=25), "25 output tokens came of 24"),
        (replace(REPORT, itl_p99_ms=float("nan")), "itl_p99_ms is nan"),
        (replace(REPORT, ttft_p50_ms=0.0), "ttft_p50_ms is 0"),
    ],
)
def test_reports_with_something_missing_are_refused(report, word):
    check_report(REPORT, PLAIN)
    with pytest.raises(InsaneResult, match=word):
        check_report(report, PLAIN)


def test_prompts_that_should_be_in_the_cache_must_be_found_there():
    cached = replace(PLAIN, input_tokens=1024, cached=True)
    check_cached(Counters(896, 1024, 0), cached)
    for counted in (Counters(500, 1024, 0), Counters(0, 0, 0)):
        with pytest.raises(InsaneResult, match="found in the cache"):
            check_cached(counted, cached)
        check_cached(counted, replace(cached, cached=False))
        check_cached(counted, replace(cached, input_tokens=128))


def test_what_servers_counted_is_read_from_their_own_words():
    sglang = SGLANG.counters((SAMPLES / "sglang-metrics.txt").read_text())
    vllm = VLLM.counters((SAMPLES / "vllm-metrics.txt").read_text())
    assert 0 < sglang.hit_tokens < sglang.prompt_tokens
    assert 0 < vllm.hit_tokens < vllm.prompt_tokens
    assert sglang.preemptions == vllm.preemptions == 0
    assert vllm.since(Counters(1, 2, 0)) == Counters(vllm.hit_tokens - 1, vllm.prompt_tokens - 2, 0)


def test_a_metric_is_summed_over_its_labels_and_no_other_is_taken_for_it():
    told = (
        'a:b_total{x="1"} 2.0\na:b_total{x="}"} 3.5\na:b_total_created{x="1"} 9.0\na:b_total 1e1\n# TYPE a:b_total c\n'
    )
    assert total(told, "a:b_total") == 15.5
    assert total(told, "a:c_total") == 0


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")
def test_sglangs_client_understands_what_it_is_asked(tmp_path):
    # The client imports the package for data sets that are never loaded here.
    (tmp_path / "datasets.py").write_text("load_dataset = None\n")
    asked = [run for workload in WORKLOADS.values() for run in runs(workload, 1, 350_000, 129 * 1024)]
    commands = [SGLANG.client(run, "http://127.0.0.1:1", "m", tmp_path / "o.json") for run in asked]
    assert all(command[1:3] == ["-m", "sglang.bench_serving"] for command in commands)
    (tmp_path / "commands.json").write_text(json.dumps([command[3:] for command in commands]))
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(tmp_path)]))
    script = [sys.executable, str(HERE / "parse_sglang_client.py"), str(tmp_path / "commands.json")]
    said = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    for run, parsed in zip(asked, json.loads(said.stdout.splitlines()[-1]), strict=True):
        assert (parsed["backend"], parsed["seed"], parsed["tokenize_prompt"]) == ("sglang", run.seed, True)
        assert parsed["request_rate"] == (run.rate or float("inf"))
        assert parsed["max_concurrency"] == (run.concurrency or None)
        assert not parsed["disable_ignore_eos"]
        if run.prefix_tokens:
            assert parsed["dataset_name"] == "generated-shared-prefix"
            assert parsed["gsp_num_groups"] * parsed["gsp_prompts_per_group"] == run.requests
            assert parsed["gsp_system_prompt_len"] + parsed["gsp_question_len"] == run.input_tokens
            assert (parsed["gsp_output_len"], parsed["gsp_range_ratio"]) == (run.output_tokens, 1)
        else:
            assert (parsed["dataset_name"], parsed["num_prompts"]) == ("random-ids", run.requests)
            assert (parsed["random_input_len"], parsed["random_output_len"]) == (run.input_tokens, run.output_tokens)
            assert parsed["random_range_ratio"] == 1
