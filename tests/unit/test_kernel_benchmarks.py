"""benchmarks.kernels: everything but the timing, on the CPU: cases, bars, inputs, traffic, the gate, peers, rows."""

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks.kernels import (
    bandwidth,
    bars,
    cases,
    decode,
    extend,
    measure,
    mla,
    table,
    timing,
    tune,
    workload,
    write,
)
from benchmarks.kernels.cases import Case
from benchmarks.kernels.gate import Check, checked_requests, compare
from benchmarks.kernels.inputs import make_inputs
from benchmarks.kernels.operation import Operation
from benchmarks.kernels.peers import paged, registry
from benchmarks.kernels.traffic import read_traffic
from kvarn.core import attend, prefill, restore
from kvarn.core.reference import decode_record, unpack_record
from kvarn.core.step import record_end

CPU = torch.device("cpu")
TINY = Case((330, 330), preset="kvarn_k4v2_g64", group=2, kv_heads=2, head_dim=64)
RAGGED = replace(TINY, contexts=(100, 400, 64, 330))
# With a prefix of 383 tokens, the step's rows push ring rows out that its first query reads.
SHAPES = [
    TINY,
    RAGGED,
    replace(TINY, contexts=(256, 128), sealing=True),
    replace(TINY, contexts=(100, 419), q_len=4),
]
TABLE_TOKENS, POOL_TILES = 1024, 3
REQUIRED_KEYS = {
    "preset", "batch", "context", "q_heads", "kv_heads", "head_dim", "q_len", "us", "us_p10", "us_p90", "packed_tbps",
    "limit_tbps", "fp16_us", "fp8_us", "turboquant_us", "rel_err", "fp8_peer", "step_us", "peers_missing",
}  # fmt: skip


@pytest.fixture(autouse=True)
def torch_reference(monkeypatch):
    monkeypatch.delenv("KVARN_FORCE_TRITON", raising=False)


def fake_timer(run, copies):
    for copy in range(copies):
        run(copy)
    return timing.Timing(10.0, 9.0, 12.0, 3)


def bench(*peers: registry.Peer, l2_bytes: int = 1) -> measure.Bench:
    return measure.Bench(CPU, fake_timer, l2_bytes, 3.0, peers, TABLE_TOKENS, POOL_TILES)


def built(case: Case, l2_bytes: int = 1, **options: bool) -> workload.Workload:
    return workload.build(make_inputs(case, CPU, POOL_TILES), l2_bytes, TABLE_TOKENS, **options)


def measured(case: Case, *peers: registry.Peer) -> dict:
    row = measure.empty_row(case, bench())
    measure.measure_case(case, bench(*peers), row)
    return row


def test_names_of_cases_are_unique():
    names = [case.name for case in cases.registry()]
    assert len(set(names)) == len(names) == len(set(cases.registry()))


@pytest.mark.parametrize("bar", bars.BARS, ids=lambda bar: bar.name)
def test_every_bar_judges_some_case_by_a_key_of_its_row(bar):
    judged = [case for case in cases.registry() if bar.applies(case)]
    assert judged
    assert bar.key in measure.empty_row(judged[0], bench())


def test_the_large_shapes_are_measured_for_both_groups():
    names = {case.name for case in cases.registry()}
    wanted = {f"k4v2_g128/{batch}x{k}k/gqa{group}" for batch in (16, 64) for k in (16, 32) for group in (4, 8)}
    assert wanted <= names
    assert {case.name for case in cases.registry() if bars.BARS[0].applies(case)} == wanted


def test_verify_rows_bring_what_they_are_compared_with():
    names = [case.name for case in cases.select(cases.registry(), only="gqa8/q4")]
    shapes = ["k4v2_g128/1x64k/gqa8", "k4v2_g128/16x16k/gqa8"]
    assert sorted(names) == sorted([*shapes, *(f"{shape}/q4" for shape in shapes)])


def test_no_verdict_passes_without_a_value():
    case = next(case for case in cases.registry() if case.name == "k4v2_g128/16x16k/gqa8")
    row = measure.empty_row(case, bench()) | {"of_limit": 0.86, "vs_fp16": 3.8, "gate_err": math.nan}
    said = {(verdict.bar.key, verdict.bar.bound): verdict.passed for verdict in bars.verdicts(case, row)}
    assert said == {
        ("of_limit", 0.85): True,
        ("vs_fp16", 3.9): False,
        ("vs_fp16", 1.0): True,
        ("vs_fp8", 1.9): None,
        ("gate_err", 2e-3): False,
    }
    assert "LOSE vs_fp16 3.8>=3.9" in table.line(row, bars.verdicts(case, row))


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_traffic_is_what_the_read_rule_names_row_by_row(case):
    made = built(case)
    step, config = made.step, made.config
    records, raw, sinks = set(), set(), set()
    for request, position in zip(step.token_request.tolist(), step.token_position.tolist(), strict=True):
        end = int(record_end(config, step, torch.tensor([request]), torch.tensor([position], dtype=torch.int32)))
        records |= {(request, at // config.tile_tokens) for at in range(end)}
        raw |= {(request, at) for at in range(end, position + 1)}
        sinks |= {request} if end and int(step.sink_slots[request]) >= 0 else set()
    row_bytes = 2 * case.kv_heads * case.head_dim * 2
    traffic = read_traffic(config, step, 2)
    assert traffic.records == len(records) * config.layout.payload_bytes * case.kv_heads > 0
    assert traffic.raw == len(raw) * row_bytes
    assert traffic.sinks == len(sinks) * config.sink_tokens * row_bytes > 0
    assert int(made.state.faults) == 0


def test_an_unsealed_step_reads_a_tail_of_average_length():
    step = built(replace(TINY, contexts=(640,))).step
    assert int(step.seal_tile.max()) == -1
    assert int(step.seq_lens[0] - record_end(built(TINY).config, step, torch.tensor([0]), step.token_position)) == 160
    assert int(built(replace(TINY, contexts=(640,), sealing=True)).step.seal_tile[0]) == 9


def test_layers_outgrow_the_cache_and_differ():
    traffic = built(TINY).traffic.total
    layers = built(TINY, l2_bytes=traffic).layers
    assert len(layers) * traffic >= 3 * traffic
    assert not torch.equal(layers[0].records, layers[1].records)
    assert not torch.equal(layers[0].tails, layers[1].tails)


def test_pages_are_shuffled_and_belong_to_one_request():
    table_of = built(RAGGED).block_table
    used = [row[: -(-length // 64)].tolist() for row, length in zip(table_of, RAGGED.seq_lens, strict=True)]
    flat = sum(used, [])
    assert sorted(flat) == list(range(1, len(flat) + 1)) != flat
    assert table_of.shape[1] * 64 >= TABLE_TOKENS


@pytest.mark.parametrize("case", [TINY, replace(TINY, preset="kvarn_k4v4_g128", head_dim=96)], ids=lambda c: c.name)
def test_records_are_sealed_rows_of_the_pool(case):
    made = built(case)
    layout = made.config.layout
    records = made.layers[0].records.view(-1, case.kv_heads, layout.record_bytes)
    assert all((tile.codes != 0).any(-1).any(-1).all() for tile in unpack_record(records, layout))
    shape = (-1, layout.tile_tokens, case.kv_heads, layout.head_dim)
    pools = workload._pools(made.inputs, layout)
    for restored, rows in zip(decode_record(pools.records, layout), pools.raw, strict=True):
        want = rows.reshape(shape).transpose(1, 2).float()
        assert (restored - want).norm() < 0.4 * want.norm()
    assert {r.tobytes() for r in records.flatten(0, 1).numpy()} <= {
        r.tobytes() for r in pools.records.flatten(0, 1).numpy()
    }
    for raw in (made.layers[0].tails, made.layers[0].sinks):
        assert (raw != 0).any(-1).all()


def test_keys_have_outliers_and_a_common_mean():
    pool = make_inputs(TINY, CPU).key_pool.float()
    mean = pool.mean(dim=0).abs()
    assert (mean.amax(dim=-1) > 10 * mean.median(dim=-1).values).all()


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_the_gate_passes_what_is_right(case):
    assert built(case).check().passed


@pytest.mark.parametrize("case", [TINY, replace(TINY, q_len=4)], ids=lambda case: case.name)
def test_the_gate_rejects_what_is_wrong_and_no_time_is_told(case, monkeypatch):
    right = workload.attention
    monkeypatch.setattr(workload, "attention", lambda *args: right(*args) * 1.01)
    row = measured(case, *registry.select(["sdpa"]))
    assert "float64" in row["failed"]
    assert row["rel_err"] == pytest.approx(0.01, rel=0.1)
    assert row["us"] is row["packed_tbps"] is row["fp16_us"] is None


def test_the_gate_forgives_the_rounding_of_the_output_alone():
    want = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert compare(want.bfloat16(), want).own_error == 0
    assert not compare((want * 1.004).bfloat16(), want).passed
    assert not Check(math.nan, 0.0).passed


def test_the_longest_request_is_always_checked():
    assert checked_requests((5, 9, 5, 5)) == [0, 1, 2, 3]
    assert checked_requests((1 << 20,) * 64) == [0]


def test_a_flow_of_cases_writes_flat_rows_with_all_keys(tmp_path, capsys):
    chosen = [TINY, RAGGED, replace(TINY, q_len=4)]
    assert decode.run(chosen, bench(*registry.select(["sdpa", "flashinfer-fp8"])), tmp_path / "rows.json")
    written = json.loads((tmp_path / "rows.json").read_text())
    assert {"commit", "gpu", "driver", "command"} <= written["provenance"].keys()
    assert [row["case"] for row in written["rows"]] == [case.name for case in chosen]
    for row in written["rows"]:
        assert row.keys() >= REQUIRED_KEYS
        assert all(isinstance(value, (str, int, float, bool, type(None))) for value in row.values())
        assert row["us"] == 10.0 and row["fp16_us"] == 10.0 and row["fp8_us"] is None
        assert row["fp16_peer"].startswith("sdpa-flash") and row["fp16_rel_err"] < 1e-3
        assert "flashinfer" in row["peers_missing"]
    assert written["rows"][2]["vs_q_len_1"] == 1.0
    assert "LOSE" in capsys.readouterr().out


def test_an_output_of_nan_fails_and_still_makes_valid_json(tmp_path, monkeypatch):
    monkeypatch.setattr(workload, "attention", lambda q, *_args: q * math.nan)
    assert not decode.run([TINY], bench(), tmp_path / "rows.json")
    (row,) = json.loads((tmp_path / "rows.json").read_text(), parse_constant=pytest.fail)["rows"]
    assert "nan" in row["failed"] and row["us"] is None


def test_after_a_broken_context_or_the_deadline_nothing_is_begun(tmp_path, monkeypatch):
    def lose(*_args):
        raise measure.DeviceLost("illegal memory access")

    assert not decode.run([TINY], bench(), tmp_path / "rows.json", deadline=0.0)
    monkeypatch.setattr(decode, "measure_case", lose)
    assert not decode.run([TINY, RAGGED], bench(), tmp_path / "rows.json")
    failed = [row["failed"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert "illegal memory access" in failed[0] and failed[1].startswith("not begun")


def test_a_peer_counts_only_if_it_is_right_and_the_fastest_stands(monkeypatch):
    def broken(_copy):
        raise ValueError("no kernel")

    made = [
        Operation("slow", 1, lambda _copy: 9.0, lambda: 0.0, 0.1),
        Operation("fast", 1, lambda _copy: 7.0, lambda: 0.0, 0.1),
        Operation("wrong", 1, lambda _copy: 1.0, lambda: 0.2, 0.1),
        Operation("nan", 1, lambda _copy: 1.0, lambda: math.nan, 0.1),
        Operation("broken", 1, broken, lambda: 0.0, 0.1),
    ]
    monkeypatch.setattr(measure, "operations", lambda *_args: iter(made))
    timer = replace(bench(), timer=lambda run, _copies: timing.Timing(run(0), 0.0, 0.0, 1))
    row = measure.empty_row(TINY, bench())
    missing = measure._measure_peer(registry.select(["sdpa"])[0], make_inputs(TINY, CPU, 1), timer, row)
    assert row["fp16_us"] == 7.0 and row["fp16_peer"].startswith("fast")
    assert [reason.partition(":")[0] for reason in missing] == ["wrong", "nan", "broken"]


@pytest.mark.parametrize("dtype", [torch.float16, paged.FP8])
def test_paged_rows_are_judged_by_what_the_cache_holds(dtype):
    cache = paged.paged_cache(make_inputs(RAGGED, CPU, POOL_TILES), 1, dtype, False)
    rows = [x[0].flatten(0, 1)[cache.slots()].float() for x in (cache.keys, cache.values)]
    out = torch.empty_like(cache.inputs.q)
    starts = cache.indptr(list(RAGGED.seq_lens)).tolist()
    for request, (begin, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        k, v = (x[begin:end].repeat_interleave(RAGGED.group, dim=1).transpose(0, 1) for x in rows)
        q = cache.inputs.q[request].float()[:, None]
        out[request] = torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, 0].half()
    assert cache.error(out) < 1e-3
    out[1] *= 1.1
    assert cache.error(out) > 1e-2


def test_hollow_caches_launch_the_same_over_one_page():
    real, hollow = built(RAGGED), built(RAGGED, hollow=True)
    assert hollow.layers[0].records.shape == real.layers[0].records.shape
    assert hollow.layers[0].records.untyped_storage().nbytes() < real.layers[0].records.untyped_storage().nbytes()
    assert torch.equal(hollow.step.seq_lens, real.step.seq_lens)
    assert hollow.run(0).shape == real.run(0).shape


def test_the_bandwidth_kernel_reads_every_word(device):
    # small numbers: the interpreter's sums don't wrap around
    words = torch.randint(-1000, 1000, (7 * 64,), dtype=torch.int32, device=device)
    assert int(bandwidth.read_sums(words, programs=3, block=64).sum()) == int(words.sum())


def test_percentiles_are_in_order():
    made = timing.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert made.us_p10 < made.us < made.us_p90
    assert made.us == 3.0


def test_tuning_measures_every_shape_behind_the_gate_and_leaves_none_behind(tmp_path):
    chosen = attend.launch_shape
    tried = tune.shapes([2, 4], [3], [1, 8])
    assert tune.shapes([2], [1], [3], [168], [0, 57])[1] == attend.LaunchShape(2, 1, 3, 168, 57)
    tune.run([TINY], tried, bench(), tmp_path / "tune.json", math.inf)
    rows = json.loads((tmp_path / "tune.json").read_text())["rows"]
    assert [(row["warps"], row["programs_per_sm"]) for row in rows] == [(2, 1), (2, 8), (4, 1), (4, 8)]
    assert all(row["us"] == 10.0 and row["gate_err"] < bars.ERROR_BAR and not row["failed"] for row in rows)
    assert attend.launch_shape is chosen


def test_chunks_are_measured_beside_fp16(tmp_path):
    assert extend.run(bench(), tmp_path / "extend.json", [(70, 256), (8, 100), (130, 0)])
    rows = json.loads((tmp_path / "extend.json").read_text())["rows"]
    assert [row["flash"] for row in rows] == ["reference", "tiles", "reference"]
    assert all(row["speed_vs_fp16"] == 1.0 and row["rel_err"] < 2e-3 for row in rows)


def test_a_wrong_chunk_fails_the_gate(tmp_path, monkeypatch):
    restored = restore.restore
    monkeypatch.setattr(prefill, "restore", lambda *args, **named: [2 * rows for rows in restored(*args, **named)])
    assert not extend.run(bench(), tmp_path / "extend.json", [(70, 256)])


def test_writing_is_measured_beside_gemms(tmp_path):
    shape = write.Shape("tiny", hidden=64, ffn=128, q_heads=2, kv_heads=1, head_dim=64)
    assert write.run(bench(), tmp_path / "write.json", [shape], tokens=256)
    (row,) = json.loads((tmp_path / "write.json").read_text())["rows"]
    assert row["seal_share_of_prefill"] == 1.0
    assert (row["code_distance"], row["different_codes"]) == (0, 0.0)


TINY_LATENTS = mla.Shape(heads=4, batch=2, context=384, latent_dim=128, rope_dim=16)


def test_attention_over_latents_is_measured_beside_bf16(tmp_path):
    assert mla.run(bench(), tmp_path / "mla.json", [TINY_LATENTS], torch.float16)
    (row,) = json.loads((tmp_path / "mla.json").read_text())["rows"]
    assert row.keys() >= {"heads", "batch", "context", "us", "bf16_us", "ratio"}
    assert (row["bf16_peer"], row["ratio"]) == ("torch-bmm", 1.0)
    work = mla.build(TINY_LATENTS, bench(), torch.float16)
    # two tiles of records, then what the request wrote itself
    assert work.step.own_start.tolist() == [256, 256]
    assert work.step.seal_tile.tolist() == [-1, -1]


def test_drafts_over_latents_are_measured_alone(tmp_path):
    shape = replace(TINY_LATENTS, q_len=4)
    assert mla.run(bench(), tmp_path / "mla.json", [shape], torch.float16)
    (row,) = json.loads((tmp_path / "mla.json").read_text())["rows"]
    assert (row["q_len"], row["bf16_us"]) == (4, None)
    step = mla.build(shape, bench(), torch.float16).step
    assert (step.rows_in_ring, step.token_position.tolist()[:4]) == (True, [444, 445, 446, 447])


def test_wrong_attention_over_latents_fails_the_gate(tmp_path, monkeypatch):
    attend = mla.latent_attention
    monkeypatch.setattr(mla, "latent_attention", lambda *args: 1.1 * attend(*args))
    assert not mla.run(bench(), tmp_path / "mla.json", [TINY_LATENTS], torch.float16)


def test_wrong_records_fail_the_gate(tmp_path, monkeypatch):
    shape = write.Shape("tiny", hidden=64, ffn=128, q_heads=2, kv_heads=1, head_dim=64)
    monkeypatch.setattr(write, "seal", lambda *args: None)
    assert not write.run(bench(), tmp_path / "write.json", [shape], tokens=256)
