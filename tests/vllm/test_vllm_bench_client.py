"""What `kvarn bench serve` asks of vLLM's own benchmark client, parsed by that client."""

import pytest

from kvarn.bench.engines import ENGINES
from kvarn.bench.workloads import WORKLOADS, runs

RUNS = [run for workload in WORKLOADS.values() for run in runs(workload, 1, 350_000, 129 * 1024)]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.input_tokens}-{run.concurrency}-{run.requests}")
def test_vllms_client_understands_what_it_is_asked(run, tmp_path):
    from kvarn.bench.vllm_client import parser

    command = ENGINES["vllm"].client(run, "http://127.0.0.1:1", "m", tmp_path / "o.json")
    assert command[1:3] == ["-m", "kvarn.bench.vllm_client"]
    parsed = parser().parse_args(command[3:])
    assert (parsed.backend, parsed.seed, parsed.num_prompts) == ("vllm", run.seed, run.requests)
    assert (parsed.request_rate, parsed.max_concurrency) == (run.rate or float("inf"), run.concurrency or None)
    assert (parsed.ignore_eos, parsed.temperature, parsed.save_result) == (True, 0, True)
    if run.prefix_tokens:
        assert parsed.dataset_name == "prefix_repetition"
        assert parsed.prefix_repetition_num_prefixes == run.sessions
        assert parsed.prefix_repetition_prefix_len + parsed.prefix_repetition_suffix_len == run.input_tokens
        assert parsed.prefix_repetition_output_len == run.output_tokens
    else:
        assert parsed.dataset_name == "random"
        assert (parsed.random_input_len, parsed.random_output_len) == (run.input_tokens, run.output_tokens)
        assert float(parsed.random_range_ratio) == 0
