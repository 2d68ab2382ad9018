"""Attention over latents against the float64 reference over the same records, in poisoned memory, on odd shapes."""

import pytest
import torch
from gluon_on_torch import Emulated
from latent_cases import LatentCase, make_latent_case
from tolerance import ATTEND_MAX, ATTEND_RMS, LATENT_LSE_RELATIVE, LSE, relative_max, relative_rms

from kvarn.core.latent import attend as attend_module
from kvarn.core.latent.attend import attend_latents, attend_latents_reference, has_explicit_latents, latent_shape
from kvarn.core.latent.layout import LatentLayout

OVER_TORCH = Emulated(
    "gluon.latent", "attend_latents_kernel", "gluon.codes", "gluon.record", "gluon.attend", "gluon.latent_rows"
)
GROUPS_OVER_TORCH = Emulated(
    "gluon.latent_groups", "attend_latents_by_groups_kernel", "gluon.codes", "gluon.record", "gluon.attend",
    "gluon.group_tiles", "gluon.latent_turns",
)  # fmt: skip


def _over_torch(_layout: object, columns: int, *_: object) -> tuple[Emulated, dict[str, object]]:
    return (GROUPS_OVER_TORCH, {}) if columns > 16 else (OVER_TORCH, {"ROOM": 1})


def check(case: LatentCase, device: str) -> None:
    case.store_and_seal()
    scale = case.layer.config.layout.row_dim**-0.5
    queries = (case.q_latent.double(), case.q_rope.double())
    want, want_lse = attend_latents_reference(*queries, case.raw, case.layer, case.step, scale)
    moved = case.to(device)
    got, lse = attend_latents(moved.q_latent, moved.q_rope, moved.raw, moved.layer, moved.step, scale)
    assert torch.isfinite(got).all()
    assert relative_rms(got, want) < ATTEND_RMS[got.dtype]
    assert relative_max(got, want) < ATTEND_MAX
    assert torch.allclose(lse.cpu().double(), want_lse, atol=LSE, rtol=LATENT_LSE_RELATIVE)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 513])
def test_decode_matches_reference_at_every_kind_of_length(length, device, dtype):
    check(make_latent_case([length], [1], dtype=dtype), device)


@pytest.mark.parametrize("heads", [1, 5, 20, 72])
def test_decode_matches_reference_for_any_number_of_heads(heads, device):
    check(make_latent_case([200], [1], heads=heads), device)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("tile", "rope_bits"), [(64, 16), (128, 8)])
def test_decode_matches_reference_for_every_width_of_code(bits, tile, rope_bits, device):
    check(make_latent_case([400, 131], [1, 1], bits=bits, tile=tile, rope_bits=rope_bits), device)


@pytest.mark.parametrize(("latent_dim", "rope_dim"), [(512, 64), (256, 32), (128, 16)])
def test_decode_and_chunk_match_reference_for_every_latent(latent_dim, rope_dim, device):
    for new in ([1, 1], [3, 1]):
        check(make_latent_case([200, 64], new, latent_dim=latent_dim, rope_dim=rope_dim, heads=8, rope_bits=8), device)


@pytest.mark.parametrize("programs", [1, 3, 50])
@pytest.mark.parametrize("new", [[1, 1, 1], [5, 1, 3]])
def test_result_does_not_depend_on_how_work_is_shared(programs, new, device, monkeypatch):
    monkeypatch.setattr(attend_module, "num_latent_programs", lambda *args: programs)
    check(make_latent_case([300, 3, 128], new, heads=2), device)


@pytest.mark.parametrize(
    ("lengths", "new"), [([0], [70]), ([40, 0], [33, 3]), ([191], [20]), ([200, 127, 0], [1, 12, 9])]
)
def test_chunk_matches_reference_with_any_prefix(lengths, new, device, dtype):
    check(make_latent_case(lengths, new, dtype=dtype, heads=2), device)


@pytest.mark.parametrize(("rows", "heads"), [(2, 5), (5, 6)])
def test_drafts_match_reference_wherever_a_tile_ends(rows, heads, device):
    case = make_latent_case([191, 126, 0], [rows] * 3, heads=heads, drafts=5)
    assert case.step.rows_in_ring
    check(case, device)


CANONICAL = {"canonical": True, "tail": 0, "sink": 0}
MODES = [CANONICAL, {"hits": [64, 128]}, {"outliers": True}, {"tail": 3}, {"tail": 0, "sink": 0}]
MODES += [{"batch_invariant": True}, {"sink": 16, "slots": 1}, {"tiles_per_block": 3}]


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_decode_matches_reference_in_every_mode(settings, device):
    check(make_latent_case([256, 129], [1, 1], heads=2, **settings), device)


@pytest.mark.parametrize("settings", MODES[:3], ids=str)
def test_chunk_matches_reference_where_it_reads_otherwise(settings, device):
    check(make_latent_case([120, 129], [9, 2], heads=2, **settings), device)


def test_heads_are_split_evenly(monkeypatch):
    layout, heads, device = LatentLayout(512, 64, 128, 4, 16), (1, 16, 20, 40, 96, 128), torch.device("cpu")
    assert [latent_shape(layout, n, device) for n in heads] == [(n, 16) for n in (1, 16, 10, 10, 16, 16)]
    monkeypatch.setattr(attend_module, "has_latent_groups", lambda *_: True)
    shapes = [(1, 64), (16, 64), (20, 64), (40, 64), (48, 64), (64, 64)]
    assert [latent_shape(layout, n, device) for n in heads] == shapes


@pytest.mark.parametrize("rope_bits", [16, 8])
@pytest.mark.parametrize(
    ("lengths", "new", "heads", "more"),
    [
        ([700, 130], [1, 1], 20, {"hits": [256, 0]}),
        ([700, 130], [9, 1], 64, {"hits": [256, 0]}),
        ([700, 130], [3, 3], 16, {"drafts": 2}),
        ([300, 128], [1, 1], 128, {"canonical": True, "tail": 0, "sink": 0}),
        ([300], [1], 96, {"batch_invariant": True}),
    ],
    ids=["decode", "chunk", "drafts", "canonical", "invariant"],
)
def test_warp_groups_match_reference(lengths, new, heads, more, rope_bits, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(attend_module, "has_latent_groups", lambda *_: True)
        monkeypatch.setattr(attend_module, "_attend_kernel", _over_torch)
    options = {"latent_dim": 512, "rope_dim": 64, "tile": 128, "tail": 128, "rope_bits": rope_bits, **more}
    check(make_latent_case(lengths, new, heads=heads, device=device, **options), device)


@pytest.mark.parametrize("rope_bits", [16, 8])
@pytest.mark.parametrize("new", [[1, 1], [9, 1]])
def test_explicit_layouts_match_reference_where_they_run_over_torch(new, rope_bits, device, monkeypatch):
    if device != "cpu":
        pytest.skip("a GPU runs them in the other tests")
    monkeypatch.setattr(attend_module, "_attend_kernel", _over_torch)
    options = {"latent_dim": 512, "rope_dim": 64, "tile": 128, "tail": 128, "heads": 20, "rope_bits": rope_bits}
    case = make_latent_case([700, 130], new, hits=[256, 0], **options)
    assert has_explicit_latents(case.layer.config.layout, torch.device("cuda"))
    check(case, device)
