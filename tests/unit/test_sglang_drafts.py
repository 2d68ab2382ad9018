"""Drafts in SGLang, without a server: what is refused, what follows, and how trees become chains."""

from types import SimpleNamespace

import pytest

from kvarn.presets import get_preset
from kvarn.sglang_backend import compat, compat_hooks
from kvarn.sglang_backend.drafts import declared_draft_flags, draft_reasons, drafts_with_model

np = pytest.importorskip("numpy")
PRESET = get_preset("kvarn_k4v2_g128")
CHAIN = {"speculative_num_steps": 3, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4}


def flags(algorithm, **changes):
    """Flags as SGLang has them when nothing else was typed."""
    unset = dict.fromkeys((*CHAIN, "speculative_draft_attention_backend"))
    return SimpleNamespace(
        **{"speculative_algorithm": algorithm, "speculative_ngram_max_bfs_breadth": 10, **unset, **changes}
    )


class TestFlags:
    @pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "NEXTN", "STANDALONE", "eagle"])
    def test_chains_of_a_draft_model_are_served_and_their_length_is_decided(self, algorithm):
        assert draft_reasons(flags(algorithm), PRESET) == []
        assert drafts_with_model(flags(algorithm))
        assert declared_draft_flags(flags(algorithm)) == CHAIN

    @pytest.mark.parametrize(
        ("typed", "decided"),
        [
            ({"speculative_num_steps": 5}, {"speculative_eagle_topk": 1, "speculative_num_draft_tokens": 6}),
            ({"speculative_num_draft_tokens": 8}, {"speculative_num_steps": 7, "speculative_eagle_topk": 1}),
            ({"speculative_eagle_topk": 1}, {"speculative_num_steps": 3, "speculative_num_draft_tokens": 4}),
            (CHAIN, {}),
            ({"speculative_adaptive": True}, {}),
        ],
        ids=lambda flags: "-".join(flags) or "nothing",
    )
    def test_length_that_was_typed_or_adapts_is_left_alone(self, typed, decided):
        assert declared_draft_flags(flags("EAGLE", **typed)) == decided

    def test_n_grams_of_breadth_1_are_served_as_they_are(self):
        view = flags("NGRAM", speculative_ngram_max_bfs_breadth=1, speculative_num_draft_tokens=128)
        assert draft_reasons(view, PRESET) == []
        assert not drafts_with_model(view)
        assert declared_draft_flags(view) == {}

    def test_without_drafts_nothing_is_said_or_decided(self):
        view = flags(None, speculative_eagle_topk=4, enable_mixed_chunk=True)
        assert draft_reasons(view, PRESET) == []
        assert declared_draft_flags(view) == {}
        assert not drafts_with_model(view)

    @pytest.mark.parametrize(
        ("view", "said"),
        [
            (flags("DFLASH"), ["--speculative-algorithm DFLASH", "one of EAGLE, EAGLE3, NEXTN, STANDALONE, NGRAM"]),
            (flags("DSPARK"), ["--speculative-algorithm DSPARK", "have not been tested with tiles"]),
            (flags("UNO"), ["--speculative-algorithm UNO"]),
            (flags("A_PLUGIN"), ["--speculative-algorithm A_PLUGIN"]),
            (flags("FROZEN_KV_MTP"), ["read raw K and V rows"]),
            (
                flags("EAGLE", speculative_eagle_topk=4),
                ["--speculative-eagle-topk 4", "pass --speculative-eagle-topk 1"],
            ),
            (flags("NGRAM"), ["breadth 10 makes a tree", "pass --speculative-ngram-max-bfs-breadth 1"]),
            (flags("EAGLE", speculative_num_steps=128), ["129 tokens", "at most 128"]),
            (
                flags("NGRAM", speculative_ngram_max_bfs_breadth=1, speculative_num_draft_tokens=129),
                ["129 tokens", "at most 128"],
            ),
            (
                flags("EAGLE", speculative_draft_attention_backend="kvarn"),
                ["--speculative-draft-attention-backend kvarn"],
            ),
            (flags("EAGLE", enable_multi_layer_eagle=True), ["--enable-multi-layer-eagle"]),
            (flags("EAGLE3", enable_mixed_chunk=True), ["--enable-mixed-chunk can't be used with drafts"]),
        ],
        ids=lambda value: value.speculative_algorithm if isinstance(value, SimpleNamespace) else "",
    )
    def test_what_cannot_be_served_gives_one_reason_and_what_to_do(self, view, said):
        (reason,) = draft_reasons(view, PRESET)
        assert all(words in reason for words in said)


def test_drafts_in_a_version_without_tests_of_them_are_refused_unless_accepted(monkeypatch):
    monkeypatch.setattr(compat, "engine_version", lambda: "0.5.17")
    (reason,) = compat.draft_version_reasons()
    assert "SGLang 0.5.17" in reason
    assert "sglang==0.5.23" in reason
    monkeypatch.setenv("KVARN_ALLOW_UNTESTED_ENGINE", "1")
    assert compat.draft_version_reasons() == []
    monkeypatch.setattr(compat, "engine_version", lambda: "0.5.23+cpu")
    monkeypatch.delenv("KVARN_ALLOW_UNTESTED_ENGINE")
    assert compat.draft_version_reasons() == []


@pytest.mark.parametrize("attention", ["MHA", "MLA"])
def test_draft_model_attends_by_what_sglang_would_choose_for_the_model(monkeypatch, attention):
    overrides = pytest.importorskip("sglang.srt.arg_groups.overrides")
    config = SimpleNamespace(attention_arch=SimpleNamespace(name=attention))
    monkeypatch.setattr(compat_hooks, "flags_of", lambda _: SimpleNamespace(device="cuda"))
    monkeypatch.setattr(overrides, "model_config_of", lambda _: config)
    monkeypatch.setattr(overrides, "get_default_attn_backend", lambda _, **asked: asked)
    asked = {"use_mla_backend": attention == "MLA", "model_config": config}
    assert compat_hooks.default_attention_backend(None) == str(asked)


def test_on_hopper_chains_of_drafts_attend_by_flash_attention_3_whatever_the_page(monkeypatch):
    overrides = pytest.importorskip("sglang.srt.arg_groups.overrides")
    chooser = pytest.importorskip("sglang.srt.arg_groups.model_override_base")
    config = SimpleNamespace(
        attention_arch=SimpleNamespace(name="MHA"),
        hf_config=SimpleNamespace(architectures=[]),
        has_attention_sinks=False,
        has_asymmetric_kv=False,
    )
    flags = {"device": "cuda", "page_size": 128, "speculative_eagle_topk": 1, "speculative_algorithm": "EAGLE"}
    hopper = SimpleNamespace(is_hopper_with_cuda_12_3=True, is_sm100=False, is_hip=False, has_flashinfer=False)
    monkeypatch.setattr(compat_hooks, "flags_of", lambda _: SimpleNamespace(**flags))
    monkeypatch.setattr(overrides, "model_config_of", lambda _: config)
    monkeypatch.setattr(chooser, "get_platform", lambda: hopper)
    assert chooser.get_default_attn_backend(SimpleNamespace(**flags), False, config) == "triton"
    assert compat_hooks.default_attention_backend(None) == "fa3"
    # what else it would take for pages of one token may not know ours
    blackwell = SimpleNamespace(is_hopper_with_cuda_12_3=False, is_sm100=True, is_hip=False, has_flashinfer=True)
    monkeypatch.setattr(chooser, "get_platform", lambda: blackwell)
    assert compat_hooks.default_attention_backend(None) == "flashinfer"


def mask_of(parents):
    """Return the mask of a tree, by the parent of each token."""
    mask = np.eye(len(parents), dtype=np.int64)
    for i, parent in enumerate(parents[1:], 1):
        mask[i] |= mask[parent]
    return mask


@pytest.mark.parametrize(
    ("tokens", "parents", "chain"),
    [
        ([9, 1, 2, 3, 4], [0, 0, 1, 2, 3], [9, 1, 2, 3, 4]),
        ([9, 1, 2, 0, 0], [0, 0, 1, 0, 0], [9, 1, 2, 0, 0]),
        ([9, 0, 0, 0, 0], [0, 0, 0, 0, 0], [9, 0, 0, 0, 0]),
        ([9, 7, 1, 2, 3], [0, 0, 0, 2, 3], [9, 1, 2, 3, 7]),
        ([9, 7, 1, 8, 2], [0, 0, 0, 1, 2], [9, 7, 8, 1, 2]),
        ([9], [0], [9]),
    ],
    ids=["chain", "padding", "nothing", "a branch before it", "two of a length", "no drafts"],
)
def test_longest_path_comes_first_and_is_a_chain(tokens, parents, chain):
    from kvarn.core.chains import longest_chains

    # beside another request, whose tree is another
    others = list(range(len(tokens)))
    trees = np.concatenate([mask_of([0] * len(tokens)), mask_of(parents)]).reshape(-1)
    found, mask = longest_chains(np.array([*others, *tokens]), trees)
    assert found.tolist() == [*others, *chain]
    assert mask.reshape(2, len(tokens), -1).tolist() == [np.tri(len(tokens), dtype=int).tolist()] * 2
    assert mask.dtype == trees.dtype
