"""Rotation, ring and sink writes, and sealing, kernels against references and against themselves."""

import pytest
import torch
from cases import make_case, store_and_seal, to_device
from tolerance import relative_rms

from kvarn.core import seal as seal_module
from kvarn.core.append import rotate_rows, rotate_rows_reference, store_tail, store_tail_reference
from kvarn.core.layout import HEAD_DIMS
from kvarn.core.reference import decode_record, unpack_record
from kvarn.core.seal import append_and_seal, seal, seal_reference
from kvarn.presets import PRESETS


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256, 512])
def test_rotation_matches_reference(head_dim, device, dtype):
    case = make_case([10, 3], [5, 30], head_dim=head_dim, dtype=dtype)
    moved = to_device(case, device)
    got = rotate_rows(moved.k, moved.v, moved.layer, moved.step, store=False)
    want = rotate_rows_reference(case.k, case.v)
    assert torch.equal(got.k.cpu(), want.k)
    assert relative_rms(got.v, want.v) < 1e-4
    if head_dim & (head_dim - 1) == 0:  # sums in the reference's order
        assert torch.equal(got.v.cpu(), want.v)


@pytest.mark.parametrize(
    ("lengths", "settings"),
    [
        ([255, 0, 127, 300], {"head_dim": 128, "kv_heads": 3}),
        ([383], {"preset": "kvarn_k4v2_g64", "head_dim": 256, "group": 8}),
        ([127] * 5 + [1, 2] * 8, {"kv_heads": 1, "tiles_per_block": 3, "slots": 9}),
    ],
    ids=["ragged", "one", "more requests than programs"],
)
def test_one_launch_appends_and_seals_as_two_do(lengths, settings, device, dtype, monkeypatch):
    made = make_case(lengths, [1] * len(lengths), dtype=dtype, **settings)
    cases = [to_device(made, device) for _ in range(2)]
    monkeypatch.setattr(seal_module, "_DECODE_PROGRAMS", 6)
    if len(lengths) > 1:  # strided rows, as a model's fused projection leaves them
        for case in cases:
            case.k, case.v = torch.cat((case.k, case.v), dim=1).split([case.k.shape[1], case.v.shape[1]], dim=1)
    launched = []
    monkeypatch.setattr(
        seal_module, "rotate_rows", lambda *args, **named: launched.append(1) or rotate_rows(*args, **named)
    )
    rotated = [append_and_seal(cases[0].k, cases[0].v, cases[0].layer, cases[0].step)]
    assert not launched
    monkeypatch.setattr(seal_module, "_APPENDED_AT_ONCE", 0)
    rotated.append(append_and_seal(cases[1].k, cases[1].v, cases[1].layer, cases[1].step))
    assert launched
    for name in ("k", "v"):
        assert torch.equal(getattr(rotated[0], name), getattr(rotated[1], name))
    for name in ("records", "tails", "sinks"):
        ours, theirs = (getattr(case.layer, name).contiguous().view(torch.uint8) for case in cases)
        assert torch.equal(ours, theirs)
    assert not torch.equal(cases[0].layer.records.cpu(), made.layer.records), "no tile was sealed"


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", ["kvarn_k4v2_g128", "kvarn_k4v2_g64"])
@pytest.mark.parametrize("programs", [1, 16])
def test_registers_of_programs_that_seal_fit_a_multiprocessor(preset, head_dim, programs):
    config = make_case([1], [1], preset=preset, head_dim=head_dim, kv_heads=8).layer.config
    options = seal_module._constants(config, torch.device("cpu"), True, programs).named
    threads = 32 * options["num_warps"]
    # two of eight warps where there are more programs than half a GPU's multiprocessors
    at_once = 2 if programs == 16 and threads == 256 else 1
    assert options["maxnreg"] * threads * at_once <= 65536


def test_rotation_takes_strided_rows(device):
    case = to_device(make_case([10], [33]), device)
    k, v = torch.cat((case.k, case.v), dim=1).split([case.k.shape[1], case.v.shape[1]], dim=1)
    got = rotate_rows(k, v, case.layer, case.step, store=False)
    want = rotate_rows(case.k, case.v, case.layer, case.step, store=False)
    assert torch.equal(got.k, want.k)
    assert torch.equal(got.v, want.v)


@pytest.mark.parametrize("head_dim", [96, 128])
def test_a_row_gets_the_same_bits_in_any_batch(head_dim, device, dtype):
    case = to_device(make_case([0], [600], dtype=dtype, head_dim=head_dim), device)
    whole = rotate_rows(case.k, case.v, case.layer, case.step, store=False)
    for begin, end in ((0, 1), (37, 38), (50, 571)):
        part = (x[begin:end] for x in (case.k, case.v))
        got = rotate_rows(*part, case.layer, case.step, store=False)
        assert torch.equal(got.k, whole.k[begin:end])
        assert torch.equal(got.v, whole.v[begin:end])


@pytest.mark.parametrize(("lengths", "new"), [([300, 2], [1, 1]), ([300, 0, 127], [20, 700, 1])])
def test_store_tail_matches_reference(lengths, new, device, dtype):
    case = make_case(lengths, new, dtype=dtype)
    moved = to_device(case, device)
    store_tail(moved.rotated, moved.layer, moved.step)
    store_tail_reference(case.rotated, case.layer, case.step)
    for got, want in ((moved.layer.tails, case.layer.tails), (moved.layer.sinks, case.layer.sinks)):
        assert torch.equal(got.cpu().nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("rows", [1, 4])
def test_decode_and_verify_store_in_the_launch_that_rotates(rows, device, dtype):
    case = to_device(make_case([300, 2, 127], [rows] * 3, dtype=dtype, drafts=3), device)
    rotated = rotate_rows(case.k, case.v, case.layer, case.step, store=True)
    stored = case.layer.tails.clone(), case.layer.sinks.clone()
    store_tail(rotated, case.layer, case.step)
    assert torch.equal(stored[0].nan_to_num(7.0), case.layer.tails.nan_to_num(7.0))
    assert torch.equal(stored[1].nan_to_num(7.0), case.layer.sinks.nan_to_num(7.0))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_seal_matches_reference(preset, head_dim, device, dtype):
    """Codes within one, few of them different: where a number is halfway; the rest is restored alike."""
    case = make_case([200, 127], [60, 1], preset=preset, head_dim=head_dim, dtype=dtype, kv_heads=1, group=2)
    moved = to_device(case, device)
    seal(moved.rotated, moved.layer, moved.step)
    seal_reference(case.rotated, case.layer, case.step)
    layout = case.layer.config.layout
    done = case.step.seal_tile >= 0
    pages = case.step.block_table[case.step.seal_request[done].long(), case.step.seal_tile[done].long()].long()
    got, want = (x.layer.records.cpu()[case.layer.pages_of(pages)] for x in (moved, case))
    for ours, theirs, bits in zip(
        unpack_record(got, layout), unpack_record(want, layout), (layout.key_bits, layout.value_bits), strict=True
    ):
        same = ours.codes == theirs.codes
        assert (ours.codes - theirs.codes).abs().max() <= 1
        assert (~same).float().mean() < (0.05 if bits == 8 else 0.001)
        assert relative_rms(ours.restore()[same], theirs.restore()[same]) < 3e-3  # one code moves a token's scale


@pytest.mark.parametrize("tiles_per_block", [1, 3])
def test_padding_of_pages_is_left_alone(tiles_per_block, device):
    case = make_case([200], [60], pad=1, tiles_per_block=tiles_per_block)
    moved = to_device(case, device)
    seal(moved.rotated, moved.layer, moved.step)
    whole = torch.as_strided(moved.layer.records, (moved.layer.records.untyped_storage().nbytes(),), (1,), 0).cpu()
    blocks, tiles, heads, record = moved.layer.records.shape
    whole = whole.view(blocks, tiles + 1, heads + 1, record + 128)
    assert (whole[:, tiles:] == 0xFF).all()
    assert (whole[:, :, heads:] == 0xFF).all()
    assert (whole[..., record:] == 0xFF).all()


@pytest.mark.parametrize("dtype_name", ["float16"])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 1.0, 3e4])
def test_seal_survives_extreme_rows(scale, dtype_name, device):
    case = make_case([0], [128], dtype=getattr(torch, dtype_name), sink=0)
    rows = (case.rotated.k.float() * scale).clamp(-65280, 65280)
    rows[5] = 0.0
    case.rotated.k.copy_(rows)
    case.rotated.v.copy_(torch.full_like(case.rotated.v, scale))
    moved = to_device(case, device)
    seal(moved.rotated, moved.layer, moved.step)
    page = int(case.step.block_table[0, 0])
    k, v = decode_record(moved.layer.records[moved.layer.pages_of(page)].cpu(), case.layer.config.layout)
    assert torch.isfinite(k).all() and torch.isfinite(v).all()
    assert (k.transpose(0, 1) - case.rotated.k.float()).norm() <= 0.2 * case.rotated.k.float().norm() + 1e-6
    assert (v - scale).abs().max() <= 0.01 * scale + 1e-6


def test_drafts_seal_from_their_ring(device):
    """The kernel's bytes are those of the same rows in a chunk."""
    lengths, rows = [126, 200, 253, 380], [5] * 4
    found = []
    for drafts in (4, 0):
        case = to_device(make_case(lengths, rows, drafts=drafts), device)
        rotated = rotate_rows(case.k, case.v, case.layer, case.step, store=case.step.rows_in_ring)
        seal(rotated, case.layer, case.step)
        assert case.step.rows_in_ring == (drafts > 0)
        found.append(case.layer.records.cpu())
    assert torch.equal(*found)


def test_a_nan_token_harms_only_its_own_record(device):
    case = make_case([0, 0], [128, 128])
    case.rotated.k[3] = float("nan")
    case.rotated.v[3] = float("nan")
    moved = to_device(case, device)
    seal(moved.rotated, moved.layer, moved.step)
    pages = case.step.block_table[:, 0].long()
    k, v = decode_record(moved.layer.records.cpu()[moved.layer.pages_of(pages)], case.layer.config.layout)
    assert torch.isfinite(k[1]).all() and torch.isfinite(v[1]).all()


def test_sealing_in_a_batch_gives_the_bytes_of_sealing_alone(device, dtype):
    lengths, new = [0, 100, 127, 0, 255], [300, 28, 1, 128, 130]
    batch = to_device(make_case(lengths, new, dtype=dtype), device)
    seal(batch.rotated, batch.layer, batch.step)
    done = [i for i, tile in enumerate(batch.step.seal_tile.tolist()) if tile >= 0]
    want = batch.layer.records.clone()
    assert len(done) >= 5
    for i in done:
        alone = batch.step.seal_tile.clone()
        alone[[j for j in range(len(alone)) if j != i]] = -1
        batch.layer.records.fill_(0)
        step = type(batch.step)(
            **{**{f: getattr(batch.step, f) for f in batch.step.__dataclass_fields__}, "seal_tile": alone}
        )
        seal(batch.rotated, batch.layer, step)
        page = batch.layer.pages_of(
            batch.step.block_table[int(batch.step.seal_request[i]), int(batch.step.seal_tile[i])].long()
        )
        assert torch.equal(batch.layer.records[page], want[page])


def test_references_agree_with_themselves_after_store_and_seal():
    case = make_case([127, 255], [1, 1])
    store_and_seal(case)
    pages = case.step.block_table[torch.arange(2), torch.tensor([0, 1])].long()
    assert (case.layer.records[case.layer.pages_of(pages)] != 0xFF).any()
