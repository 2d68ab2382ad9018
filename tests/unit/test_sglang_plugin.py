"""The SGLang plugin without a server: what flags decide, what is refused, and how the budget is divided."""

import argparse
import dataclasses
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from kvarn.core.capacity import CacheShape, plan_capacity
from kvarn.core.layers import LayerKind
from kvarn.core.support import ModelFacts
from kvarn.core.table_pool import PoolSettings, divide_budget, pool_settings
from kvarn.core.window_pool import WindowPool
from kvarn.core.windows import WindowShape
from kvarn.errors import CapacityError, EngineIncompatible, UnknownPreset, UnsupportedConfig
from kvarn.presets import PRESETS, get_preset
from kvarn.sglang_backend import compat, compat_facts, compat_hooks, compat_layers, plugin, resolution

PRESET = get_preset("kvarn_k4v2_g128")
SHAPE = CacheShape(PRESET, layers=28, kv_heads=2, head_dim=128, raw_bytes=2, tail_tokens=128, sink_tokens=4)
GIB = 1 << 30
DENSE = ModelFacts("Qwen2ForCausalLM", "bfloat16", 128, 128)
# As many layers again, with a window.
WINDOWS = WindowPool(SHAPE, WindowShape(28, tokens=1024, kv_heads=4, head_dim=128, raw_bytes=2), ratio=0.1)
# A value of each limited flag that is not its default.
TYPED = {
    "radix_cache_backend": "other",
    "disaggregation_mode": "prefill",
    "dcp_size": 2,
    "attn_cp_size": 2,
    "pp_size": 2,
    "attn_dp_size": 2,
    "dllm_algorithm": "LowConfidence",
    "uno_lora_path": "/draft",
    "decoupled_spec_role": "verifier",
    "rl_on_policy_target": "fsdp",
    "kv_canary": "raise",
}


def flags(**changes):
    """Flags as SGLang has them when nothing was typed."""
    defaults = {limit.path: limit.default if limit.default is not None else False for limit in resolution.FLAG_LIMITS}
    unset = dict.fromkeys(
        ("attention_backend", "prefill_attention_backend", "decode_attention_backend", "page_size")
        + ("chunked_prefill_size", "max_total_tokens", "cuda_graph_backend_prefill", "cuda_graph_config")
    )
    return SimpleNamespace(**{**defaults, **unset, **changes})


def resolved(**changes):
    """Flags as they must be at the end of resolution."""
    graphs = with_graphs("disabled")
    decided = {"kv_cache_dtype": PRESET.name, **declared_flags(PRESET), "cuda_graph_config": graphs}
    return flags(**{**decided, "chunked_prefill_size": 2048, **changes})


flag_reasons = partial(resolution.flag_reasons, chunk_graphs=True)
final_reasons = partial(resolution.final_reasons, chunk_graphs=True)
declared_flags = partial(resolution.declared_flags, chunk_graphs=True)


def with_graphs(backend):
    return SimpleNamespace(prefill=SimpleNamespace(backend=backend))


class TestFlags:
    def test_defaults_are_served(self):
        assert flag_reasons(flags(), PRESET) == []
        assert final_reasons(resolved(), PRESET) == []

    @pytest.mark.parametrize("limit", resolution.FLAG_LIMITS, ids=lambda limit: limit.path)
    def test_each_limited_flag_gives_one_sentence_with_reason_and_remedy(self, limit):
        (reason,) = flag_reasons(flags(**{limit.path: TYPED.get(limit.path, True)}), PRESET)
        assert reason.startswith(f"--{limit.path.replace('_', '-')} ")
        assert f"because {limit.why}" in reason
        assert "leave it out" in reason

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"page_size": 64}, "--page-size 64"),
            ({"attention_backend": "triton"}, "--attention-backend triton"),
            ({"prefill_attention_backend": "fa3"}, "--prefill-attention-backend fa3"),
            ({"decode_attention_backend": "fa3"}, "--decode-attention-backend fa3"),
            ({"cuda_graph_backend_prefill": "full"}, "--cuda-graph-backend-prefill full"),
            ({"cuda_graph_backend_prefill": "tc_piecewise"}, "use 'disabled' or 'breakable'"),
            ({"chunked_prefill_size": 1000}, "use 896"),
            ({"chunked_prefill_size": 100}, "use 128"),
            ({"max_total_tokens": 100}, "--max-total-tokens 100"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_flag_that_the_dtype_decides_is_refused_at_another_value(self, changes, said):
        (reason,) = flag_reasons(flags(**changes), PRESET)
        assert said in reason

    @pytest.mark.parametrize(
        "changes",
        [
            {"page_size": 128, "attention_backend": "kvarn", "cuda_graph_backend_prefill": "disabled"},
            {"cuda_graph_backend_prefill": "breakable"},
            {"chunked_prefill_size": -1},
            {"chunked_prefill_size": 384},
            {"max_total_tokens": 128},
        ],
        ids=["as decided", "graphs", "no chunks", "whole pages", "one page"],
    )
    def test_flag_at_a_value_that_fits_is_served(self, changes):
        assert flag_reasons(flags(**changes), PRESET) == []

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"attention_backend": "triton"}, "triton"),
            ({"attention_backend": None}, "attention_backend to None"),
            ({"page_size": 1}, "--page-size 1"),
            ({"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype to 'fp8_e4m3'"),
            ({"cuda_graph_config": with_graphs("full")}, "'full'"),
            ({"chunked_prefill_size": 2000}, "2000"),
            ({"enable_hisparse": True}, "--enable-hisparse"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_decision_that_sglang_or_a_model_undid_is_refused(self, changes, said):
        (reason,) = final_reasons(resolved(**changes), PRESET)
        assert said in reason

    @pytest.mark.parametrize("backend", ["breakable", "disabled"])
    def test_prefill_is_served_in_breakable_graphs_and_without(self, backend):
        assert final_reasons(resolved(cuda_graph_config=with_graphs(backend)), PRESET) == []

    def test_prefill_graphs_that_were_not_tested_are_switched_off_and_refused(self):
        decided = resolution.declared_flags(PRESET, chunk_graphs=False)
        assert decided == {**declared_flags(PRESET), "disable_prefill_cuda_graph": True}
        (reason,) = resolution.flag_reasons(flags(cuda_graph_backend_prefill="breakable"), PRESET, chunk_graphs=False)
        assert "not been tested" in reason
        undone = resolved(disable_prefill_cuda_graph=False, cuda_graph_config=with_graphs("breakable"))
        lost, captured = resolution.final_reasons(undone, PRESET, chunk_graphs=False)
        assert "disable_prefill_cuda_graph" in lost
        assert "'breakable'" in captured

    def test_all_reasons_are_collected(self):
        view = flags(
            page_size=1, attention_backend="fa3", pp_size=2, enable_lmcache=True, speculative_algorithm="DFLASH"
        )
        assert len(flag_reasons(view, PRESET)) == 5


class TestBudget:
    @pytest.mark.parametrize("budget_bytes", [GIB, 10 * GIB, 60 * GIB], ids=["1GiB", "10GiB", "60GiB"])
    @pytest.mark.parametrize("requested", [None, 1, 7], ids=["derived", "1", "7"])
    def test_division_is_the_plan_of_core_capacity(self, budget_bytes, requested):
        assert divide_budget(SHAPE, budget_bytes, requested, None) == plan_capacity(SHAPE, budget_bytes, requested)

    def test_derived_limit_takes_a_tenth_of_the_budget_at_most(self):
        plan = divide_budget(SHAPE, 10 * GIB, None, None)
        assert SHAPE.fixed_bytes(plan.max_requests) <= 10 * GIB // 10 + SHAPE.fixed_bytes(0)
        assert SHAPE.fixed_bytes(plan.max_requests + 1) > 10 * GIB // 10

    @pytest.mark.parametrize(("token_cap", "limit"), [(128, 1), (1000, 7), (8192, 64), (10**9, 130)])
    def test_derived_limit_is_at_most_one_request_a_page_under_a_token_cap(self, token_cap, limit):
        assert divide_budget(SHAPE, 10 * GIB, None, token_cap).max_requests == limit

    def test_typed_limit_is_honoured_under_a_token_cap(self):
        assert divide_budget(SHAPE, 10 * GIB, 200, 1024).max_requests == 200

    def test_tails_that_leave_no_page_are_refused(self):
        with pytest.raises(CapacityError, match=r"4000 requests.*more memory\. Pass --fewer\.$"):
            divide_budget(SHAPE, GIB, 4000, None, advice="Pass --fewer.")


class TilePool:
    """Stands for the pool: keeps what it was made with."""

    settings: PoolSettings

    def __init__(self, tokens):
        self.tokens = tokens


@pytest.fixture
def configurator(monkeypatch):
    """A KVCacheConfigurator of a runner with a kvarn dtype."""
    published = []
    monkeypatch.setattr(compat_facts, "shape_of", lambda _: SHAPE)
    monkeypatch.setattr(compat_facts, "facts_of_config", lambda _: DENSE)
    monkeypatch.setattr(compat_facts, "limits_of_schedule", lambda: (None, None))
    monkeypatch.setattr(compat_facts, "draft_bytes", lambda _: 0)
    monkeypatch.setattr(compat_layers, "kept_beside", lambda _: frozenset())
    monkeypatch.setattr(compat_layers, "window_pool", lambda *_: None)
    monkeypatch.setattr(compat_hooks, "publish_request_limit", published.append)
    monkeypatch.setitem(sys.modules, "kvarn.sglang_backend.pool", SimpleNamespace(TilePool=TilePool))
    return SimpleNamespace(
        kv_cache_dtype_str=PRESET.name,
        is_draft_worker=False,
        is_hybrid_swa=False,
        mambaish_config=None,
        sliding_window_size=None,
        device="cuda",
        model_config=None,
        model_dtype="bfloat16",
        spec_algorithm=SimpleNamespace(is_standalone=lambda: False),
        published=published,
        _build_mha_kv_pool=lambda max_total_num_tokens, mha_pool_class: mha_pool_class(max_total_num_tokens),
    )


class TestPoolHooks:
    def test_budget_leaves_the_tokens_of_the_plan(self, configurator):
        plan = plan_capacity(SHAPE, 10 * GIB)
        left = plugin.charge_exact_rows(10 * GIB, configurator, 0)
        cell = plugin.record_bytes(1, None, configurator, 28)
        assert left // cell // 128 * 128 == plan.tokens
        assert configurator.published == [plan.max_requests]

    def test_draft_model_is_priced_at_its_own_size(self, configurator, monkeypatch):
        monkeypatch.setattr(compat_facts, "draft_bytes", lambda _: 6144)
        plan = plan_capacity(SHAPE, 10 * GIB, None, 6144)
        left = plugin.charge_exact_rows(10 * GIB, configurator, 0)
        sizes = SimpleNamespace(_cell_size=SHAPE.bytes_per_token * 25 // 24)  # as SGLang has it for one of 24 layers
        plugin.price_token(None, sizes, configurator)
        assert sizes._cell_size == SHAPE.bytes_per_token + 6144
        assert left // sizes._cell_size // 128 * 128 == plan.tokens
        pages = plan.tokens // 128 + 1
        assert pages * (SHAPE.page_bytes + 128 * 6144) + SHAPE.fixed_bytes(plan.max_requests) <= 10 * GIB

    @pytest.mark.parametrize("states", [False, True])
    def test_draft_model_with_states_is_refused(self, configurator, monkeypatch, states):
        configurator.spec_algorithm = SimpleNamespace(is_standalone=lambda: True)
        configurator.spec_aux_config = SimpleNamespace(draft_model_config=states)
        monkeypatch.setattr(compat_layers, "_hybrid_of", lambda config: config or None)
        if states:
            with pytest.raises(UnsupportedConfig, match="names a model with recurrent layers"):
                plugin.charge_exact_rows(10 * GIB, configurator, 0)
        else:
            assert plugin.charge_exact_rows(10 * GIB, configurator, 0) > 0

    def test_typed_request_limit_is_charged_and_kept(self, configurator, monkeypatch):
        monkeypatch.setattr(compat_facts, "limits_of_schedule", lambda: (7, None))
        left = plugin.charge_exact_rows(10 * GIB, configurator, 0)
        assert left == plan_capacity(SHAPE, 10 * GIB, 7).tokens * SHAPE.bytes_per_token
        assert configurator.published == [7]

    def test_tails_that_leave_no_page_are_refused_with_the_flags_to_change(self, configurator, monkeypatch):
        monkeypatch.setattr(compat_facts, "limits_of_schedule", lambda: (4000, None))
        with pytest.raises(CapacityError, match=r"4000 requests.*--max-running-requests and --mem-fraction-static"):
            plugin.charge_exact_rows(GIB, configurator, 0)

    def test_window_that_only_the_loaded_model_tells_of_is_refused(self, configurator):
        configurator.sliding_window_size = 4096
        with pytest.raises(UnsupportedConfig, match="sliding-window"):
            plugin.charge_exact_rows(10 * GIB, configurator, 0)

    def test_window_beside_tiles_is_served(self, configurator, monkeypatch):
        monkeypatch.setattr(compat_layers, "kept_beside", lambda _: frozenset({LayerKind.MODEL_DTYPE}))
        configurator.sliding_window_size = 4096
        assert plugin.charge_exact_rows(10 * GIB, configurator, 0) > 0

    def test_windows_leave_a_page_less_and_bound_the_requests(self, configurator, monkeypatch):
        monkeypatch.setattr(compat_layers, "window_pool", lambda *_: WINDOWS)
        left = plugin.charge_exact_rows(10 * GIB, configurator, 0)
        most = WINDOWS.most_requests(10 * GIB)
        assert 1 < most < plan_capacity(SHAPE, 10 * GIB).max_requests
        assert configurator.published == [most]
        plan = plan_capacity(SHAPE, 10 * GIB, most)
        assert left == plan.tokens * SHAPE.bytes_per_token - WINDOWS.page_bytes
        assert int(left // WINDOWS.bytes_of_both) // 128 * 128 == WINDOWS.tokens(plan)

    def test_typed_request_limit_is_not_bounded_by_windows(self, configurator, monkeypatch):
        monkeypatch.setattr(compat_layers, "window_pool", lambda *_: WINDOWS)
        monkeypatch.setattr(compat_facts, "limits_of_schedule", lambda: (500, None))
        plugin.charge_exact_rows(10 * GIB, configurator, 0)
        assert configurator.published == [500]

    @pytest.mark.parametrize(("typed", "charged"), [(None, 5), (3, 3), (500, 5)])
    def test_tails_are_charged_for_no_more_requests_than_have_states(self, configurator, monkeypatch, typed, charged):
        monkeypatch.setattr(compat_layers, "state_limit", lambda _: 5)
        monkeypatch.setattr(compat_facts, "limits_of_schedule", lambda: (typed, None))
        left = plugin.charge_exact_rows(10 * GIB, configurator, 0)
        assert configurator.published == [charged]
        assert left == plan_capacity(SHAPE, 10 * GIB, charged).tokens * SHAPE.bytes_per_token

    def test_tiles_and_windows_are_priced_each_at_their_own_bytes(self, configurator, monkeypatch):
        monkeypatch.setattr(compat_layers, "window_pool", lambda *_: WINDOWS)
        sizes = SimpleNamespace(_full_layers_num=28, _swa_layers_num=28)
        plugin.size_windows(None, sizes, configurator)
        assert sizes._full_per_token * 28 == SHAPE.bytes_per_token
        assert sizes._swa_per_token == 4 * 128 * 4
        assert sizes._cell_size == SHAPE.bytes_per_token + 0.1 * WINDOWS.bytes_per_token

    def test_pool_gets_the_rows_that_exist(self, configurator):
        table = SimpleNamespace(req_to_token=SimpleNamespace(shape=(8, 4096)))
        sizes = SimpleNamespace(max_running_requests=7, max_total_num_tokens=1280)
        pool = plugin.build_pool(None, configurator, sizes=sizes, req_to_token_pool=table)
        assert isinstance(pool, TilePool)
        assert pool.tokens == 1280
        assert pool.settings == PoolSettings(SHAPE, num_rows=8, sink_slots=56, raw_dtype="bfloat16")
        assert not hasattr(TilePool, "settings")

    def test_rows_that_were_not_charged_are_refused(self, configurator):
        table = SimpleNamespace(req_to_token=SimpleNamespace(shape=(20, 4096)))
        sizes = SimpleNamespace(max_running_requests=7, max_total_num_tokens=1280)
        with pytest.raises(EngineIncompatible, match="20 request rows for 7 requests"):
            plugin.build_pool(None, configurator, sizes=sizes, req_to_token_pool=table)

    @pytest.mark.parametrize(
        "change", [{"kv_cache_dtype_str": "auto"}, {"is_draft_worker": True}], ids=["auto", "draft"]
    )
    def test_other_pools_are_left_alone(self, configurator, change):
        vars(configurator).update(change)
        assert plugin.charge_exact_rows(GIB, configurator, 0) is None
        assert plugin.record_bytes(512, None, configurator, 28) is None
        assert plugin.price_token(None, None, configurator) is None
        assert plugin.build_pool(lambda _, **given: given, configurator, sizes=3) == {"sizes": 3}
        plugin.size_windows(None, SimpleNamespace(), configurator)

    def test_storage_is_bytes_for_the_target_and_the_model_dtype_for_a_draft(self, monkeypatch):
        torch = pytest.importorskip("torch")
        monkeypatch.setattr(compat, "require_compatible", lambda: None)
        asked = {"server_args_kv_cache_dtype": PRESET.name, "model_dtype": torch.bfloat16}
        assert plugin.storage_dtype(None, is_draft_worker=False, **asked) == (None, torch.uint8)
        keeps = lambda **given: (None, given["model_dtype"])  # noqa: E731
        typed = lambda **given: ("fp8_e4m3", given["server_args_kv_cache_dtype"])  # noqa: E731
        assert plugin.storage_dtype(keeps, is_draft_worker=True, **asked) == ("auto", torch.bfloat16)
        assert plugin.storage_dtype(typed, is_draft_worker=True, **asked) == ("fp8_e4m3", "auto")
        assert plugin.storage_dtype(lambda **given: given, server_args_kv_cache_dtype="auto") == {
            "server_args_kv_cache_dtype": "auto"
        }

    def test_settings_are_frozen_and_count_slots_without_the_padding_row(self):
        settings = pool_settings(SHAPE, 65, "bfloat16")
        assert settings.sink_slots == SHAPE.sink_slots(64)
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.num_rows = 3


class TestCommandLine:
    def test_every_kvarn_name_passes_argparse_and_other_names_do_not(self):
        parser = argparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8_e4m3"])
        plugin.accept_names(None, parser)
        for name in ("auto", *PRESETS, "kvarn_k4v9_g128"):
            assert parser.parse_args(["--kv-cache-dtype", name]).kv_cache_dtype == name
        with pytest.raises(argparse.ArgumentError, match="kvarn_k4v2_g128"):
            parser.parse_args(["--kv-cache-dtype", "k4v2"])

    def test_wrong_name_is_answered_with_the_nearest(self):
        with pytest.raises(UnknownPreset, match="kvarn_k4v4_g128"):
            plugin.check_command_line(object, argparse.Namespace(kv_cache_dtype="kvarn_k4v9_g128"))

    def test_unknown_version_is_refused_unless_accepted(self, monkeypatch):
        args = argparse.Namespace(kv_cache_dtype=PRESET.name)
        monkeypatch.setattr(compat, "engine_version", lambda: "0.5.99")
        with pytest.raises(EngineIncompatible, match=r"0\.5\.17 and 0\.5\.23.*0\.5\.99.*KVARN_ALLOW_UNTESTED_ENGINE=1"):
            plugin.check_command_line(object, args)
        monkeypatch.setenv("KVARN_ALLOW_UNTESTED_ENGINE", "1")
        plugin.check_command_line(object, args)

    @pytest.mark.parametrize("name", [None, "auto", "fp8_e4m3"])
    def test_other_dtypes_are_not_looked_at(self, name, monkeypatch):
        monkeypatch.setattr(compat, "engine_version", lambda: "0.5.99")
        plugin.check_command_line(object, argparse.Namespace(kv_cache_dtype=name))
        plugin.decide_flags(SimpleNamespace(kv_cache_dtype=name))
        plugin.confirm_flags(SimpleNamespace(kv_cache_dtype=name))

    def test_backend_without_a_dtype_is_refused(self):
        with pytest.raises(UnsupportedConfig, match="--kv-cache-dtype"):
            plugin.decide_flags(SimpleNamespace(kv_cache_dtype="auto", attention_backend="kvarn"))
