"""Every kernel compiles for a GPU on any machine: what the interpreter accepts, the compiler may refuse."""

import pytest
import torch
from compiled import compiled

from kvarn.core.explicit import has_explicit_layouts
from kvarn.core.layout import HEAD_DIMS, TileLayout
from kvarn.presets import PRESETS

KERNELS = (
    *(
        "append",
        "attend",
        "chunk_step",
        "combine",
        "combine_sinks",
        "count",
        "merge",
        "merge_sinks",
        "pages",
        "restore",
    ),
    *("restore", "rotate", "seal", "step", "store", "verify"),
)
SERVED = [
    f"{name}/{head_dim}"
    for name, preset in PRESETS.items()
    for head_dim in HEAD_DIMS
    if has_explicit_layouts(TileLayout.of(preset, head_dim), torch.device("cuda"))
]


def test_power_of_two_widths_are_served_but_for_words_narrower_than_an_operand():
    every = {f"{name}/{dim}" for name in PRESETS for dim in (64, 128, 256)}
    assert set(SERVED) == every - {"kvarn_k3v3_g128/64"}


@pytest.mark.parametrize("half", [0, 1])
def test_every_layout_compiles_for_decode(half):
    cases = [f"{name}/8" for name in SERVED[half::2]]
    made = compiled(*cases)
    assert set(made) == set(cases)
    # a multiprocessor runs all of its programs at once
    assert {case: found for case, found in made.items() if found["programs"] > found["fitting"]} == {}


def test_main_shapes_keep_their_registers():
    made = compiled("kvarn_k4v2_g128/128/8", "kvarn_k4v2_g128/128/4/4", "kvarn_k4v2_g128/128/16")
    decode = made["kvarn_k4v2_g128/128/8"]
    # six programs of two warps fit a multiprocessor up to 168 registers a thread
    assert decode["registers"] <= 168
    # outside the loop over tiles a few may wait in memory
    assert decode["stack"] <= 32


@pytest.mark.parametrize("half", [0, 1])
def test_tiles_that_warps_share_compile_for_drafts(half):
    cases = [f"{case}/8/4/verify" for case in SERVED if case.endswith("/128")][half::2]
    cases += ["kvarn_k4v2_g128/64/4/4/verify", "kvarn_k4v2_g64/64/8/4/verify"][half::2]
    made = compiled(*cases)
    assert set(made) == set(cases)
    assert {case: found for case, found in made.items() if found["programs"] > found["fitting"]} == {}
    assert all(found["stack"] <= 64 for found in made.values())


def test_programs_of_few_tasks_leave_no_room_for_more():
    few = [f"kvarn_k4v2_g128/{head_dim}/8/1/few" for head_dim in (64, 128)]
    assert all(found["programs"] == found["fitting"] for found in compiled(*few).values())


def test_canonical_mode_and_drafts_compile():
    cases = ["kvarn_k4v2_g128/64/8/1/canonical", "kvarn_k4v2_g128/64/4/4/canonical"]
    cases += ["kvarn_k4v2_g128/64/4/4/verify", "kvarn_k4v2_g128/64/4/4/verify/canonical"]
    assert set(compiled(*cases)) == set(cases)


@pytest.mark.parametrize("head_dim", [64, 96])
def test_every_other_kernel_compiles(head_dim):
    cases = [f"{kernel}/kvarn_k3v3_g128/{head_dim}" for kernel in KERNELS]
    assert set(compiled(*cases)) == set(cases)


def test_kernels_over_latents_compile_and_hardly_spill():
    cases = [f"latent/{kernel}/{bits}" for kernel in ("explicit", "restore", "seal") for bits in (16, 8)]
    cases += ["latent/rotate/16", "latent/queries/16", "latent/attend/16"]
    made = compiled(*cases)
    assert set(made) == set(cases)
    assert all(found["stack"] <= 128 for found in made.values())


def test_warp_groups_over_latents_compile():
    cases = [f"latent/groups/{bits}" for bits in (16, 8)]
    made = compiled(*cases)
    assert set(made) == set(cases)
    assert all(found["shared"] <= 227 << 10 for found in made.values())


def test_latents_of_three_bits_compile():
    cases = [f"latent/{kernel}/16/kvarn_k3v3_g128" for kernel in ("attend", "explicit", "restore", "seal")]
    assert set(compiled(*cases)) == set(cases)
