"""Rotating, storing and sealing latents against the references, in poisoned memory."""

import pytest
import torch
from latent_cases import make_latent_case
from tolerance import relative_rms

from kvarn.core.hadamard import rotate
from kvarn.core.latent.append import rotate_latents, rotate_queries, store_latents, store_latents_reference
from kvarn.core.latent.reference import decode_latents
from kvarn.core.latent.seal import seal_latents, seal_latents_reference
from kvarn.core.reference import unpack_codes


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(got.cpu().contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("lengths", "new"), [([200, 63, 0], [1, 1, 1]), ([100, 0], [7, 140])])
def test_rows_are_rotated_and_stored_where_the_reference_stores_them(lengths, new, device, dtype):
    case = make_latent_case(lengths, new, dtype=dtype, latent_dim=256)
    moved = case.to(device)
    wide = [torch.nn.functional.pad(x, (0, 7), value=torch.nan)[:, : x.shape[1]] for x in moved.rows]
    raw = rotate_latents(type(moved.rows)(*wide), moved.layer, moved.step, store=moved.step.rows_in_ring)
    torch.testing.assert_close(raw.cpu(), case.raw, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    if not moved.step.rows_in_ring:
        store_latents(raw, moved.layer, moved.step)
    store_latents_reference(raw.cpu(), case.layer, case.step)
    assert same_bits(moved.layer.tails, case.layer.tails)
    assert same_bits(moved.layer.sinks, case.layer.sinks)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rope_bits", [16, 8])
@pytest.mark.parametrize("settings", [{"tile": 64}, {"tile": 128, "latent_dim": 512, "rope_dim": 64}])
def test_records_are_those_of_the_reference(bits, rope_bits, settings, device):
    """Codes within one, few of them different: a GPU divides and multiplies a last bit apart."""
    case = make_latent_case([100, 0, 127], [290, 60, 1], bits=bits, rope_bits=rope_bits, outliers=True, **settings)
    moved = case.to(device)
    seal_latents(moved.raw, moved.layer, moved.step)
    seal_latents_reference(case.raw, case.layer, case.step)
    done = case.step.seal_tile >= 0
    assert int(done.sum()) >= 3
    pages = case.step.block_table[case.step.seal_request[done].long(), case.step.seal_tile[done].long()].long()
    got, want = (x.layer.records.cpu()[case.layer.pages_of(pages)][:, 0] for x in (moved, case))
    layout = case.layer.config.layout
    for fields in filter(None, (layout.latent_fields, layout.rope_fields)):
        ours, theirs = (unpack_codes(records, fields, layout.tile_tokens) for records in (got, want))
        assert (ours - theirs).abs().max() <= 1
        assert (ours != theirs).float().mean() < 0.005
    for ours, theirs in zip(decode_latents(got, layout), decode_latents(want, layout), strict=True):
        assert relative_rms(ours, theirs) < 0.02


def test_drafts_seal_from_their_ring(device, dtype):
    lengths, new = [62, 126, 187, 200], [5] * 4
    found = []
    for drafts in (4, 0):
        case = make_latent_case(lengths, new, drafts=drafts, dtype=dtype).to(device)
        raw = rotate_latents(case.rows, case.layer, case.step, store=case.step.rows_in_ring)
        seal_latents(raw, case.layer, case.step)
        assert case.step.rows_in_ring == (drafts > 0)
        found.append(case.layer.records.cpu())
    assert torch.equal(*found)


@pytest.mark.parametrize("tiles_per_block", [1, 3])
def test_nothing_is_written_outside_of_records(tiles_per_block, device):
    case = make_latent_case([200], [60], tiles_per_block=tiles_per_block, rope_bits=8).to(device)
    seal_latents(case.raw, case.layer, case.step)
    blocks, tiles, heads, record = case.layer.records.shape
    storage = case.layer.records.untyped_storage().nbytes()
    whole = torch.as_strided(case.layer.records, (storage,), (1,), 0).cpu()
    whole = whole.view(blocks, tiles + 1, heads + 1, record + 128)
    for outside in (whole[:, tiles:], whole[:, :, heads:], whole[..., record:]):
        assert (outside == 0xFF).all()


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 3e4])
def test_extreme_rows_are_restored_to_finite_ones_near_them(scale, device):
    case = make_latent_case([0], [64], rope_bits=8)
    case.raw.copy_((case.raw.float() * scale).clamp(-65280, 65280))
    moved = case.to(device)
    seal_latents(moved.raw, moved.layer, moved.step)
    page = moved.layer.pages_of(case.step.block_table[0, 0].long())
    restored = torch.cat(decode_latents(moved.layer.records[page].cpu(), case.layer.config.layout), dim=-1)
    want = case.raw[:, 0].float()
    assert torch.isfinite(restored).all()
    assert (restored[0] - want).norm() <= 0.15 * want.norm() + 1e-5


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_queries_are_rotated_and_scaled_into_fp16(size, device):
    case = make_latent_case([5, 9], [1, 1], heads=5, dtype=torch.bfloat16)
    q_latent, q_rope = case.q_latent * size, case.q_rope * size
    q, unit = rotate_queries(q_latent.to(device), q_rope.to(device), case.layer.config.layout)
    assert q.abs().max() <= 64
    got = q.float().cpu() * unit.cpu()[..., None]
    want = torch.cat((rotate(q_latent), q_rope.float()), dim=-1)
    assert (got - want).norm() <= 3e-4 * want.norm()
