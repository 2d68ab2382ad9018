"""Latent records: every byte has one meaning, values come back as near as codes allow, sizes are those promised."""

import random
import struct

import pytest
import torch

from kvarn.core.cache import CacheConfig, allocate_layer
from kvarn.core.capacity import LatentShape, latent_shape, plan_capacity
from kvarn.core.latent.layout import LATENT_DIMS, LatentLayout
from kvarn.core.latent.reference import decode_latents, encode_latents, quantise_channels
from kvarn.core.latent.rows import LatentRows
from kvarn.presets import PRESETS, get_preset

DEEPSEEK = (512, 64)
PRESET = get_preset("kvarn_k4v2_g128")
LAYOUTS = {
    f"l{bits}r{rope_bits}g{tile}d{dim}": LatentLayout(dim, rope_dim, tile, bits, rope_bits)
    for bits in (2, 3, 4, 8)
    for rope_bits in (16, 8)
    for tile, dim, rope_dim in ((64, 128, 16), (128, 512, 64))
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def random_rows(layout: LatentLayout, *shape: int) -> LatentRows:
    """Rows with channels far from zero and a few large tokens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, layout.tile_tokens, layout.row_dim, generator=generator)
    x[..., :5] += 30.0
    x[..., 7, :] *= 4.0
    return LatentRows(x[..., : layout.latent_dim], x[..., layout.latent_dim :])


@pytest.mark.parametrize(
    ("rope_bits", "tile", "record"),
    # codes, 4 bytes a channel, rope part (with codes 4 bytes a channel more)
    [(16, 128, 32768 + 2048 + 16384), (8, 128, 32768 + 2048 + 8192 + 256), (16, 64, 16384 + 2048 + 8192)],
)
def test_records_take_the_bytes_that_were_promised(rope_bits, tile, record):
    assert LatentLayout(*DEEPSEEK, tile, 4, rope_bits).record_bytes == record


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_latent_takes_the_bits_of_keys(preset):
    layout = LatentLayout.of(preset, *DEEPSEEK)
    assert (layout.latent_bits, layout.tile_tokens, layout.rope_bits) == (preset.key_bits, preset.tile_tokens, 16)


@every_layout
def test_every_byte_of_a_record_is_one_of_its_parts(layout):
    """Codes, read bit by bit; vectors; the rope part; zeros."""
    rows = random_rows(layout)
    record = bytes(encode_latents(rows, layout).tolist())
    latent = quantise_channels(rows.latent, layout.latent_bits)
    parts = [(latent, layout.latent_fields, layout.latent_scale_offset, layout.latent_offset_offset)]
    if layout.rope_bits == 8:
        rope = quantise_channels(rows.rope, 8)
        parts.append((rope, layout.rope_fields, layout.rope_scale_offset, layout.rope_offset_offset))
    else:
        raw = struct.unpack_from(f"<{rows.rope.numel()}e", record, layout.rope_start)
        assert list(raw) == rows.rope.half().flatten().tolist()
    pick = random.Random(0)
    for channels, fields, scale_at, offset_at in parts:
        count = channels.scale.shape[0]
        assert list(struct.unpack_from(f"<{count}e", record, scale_at)) == channels.scale.tolist()
        assert list(struct.unpack_from(f"<{count}e", record, offset_at)) == channels.offset.tolist()
        for _ in range(100):
            token, channel = pick.randrange(layout.tile_tokens), pick.randrange(count)
            code = 0
            for field in fields:
                plane, word = channel // field.words, channel % field.words
                (bits,) = struct.unpack_from("<H", record, field.offset_bytes + 2 * (token * field.words + word))
                code |= (bits >> plane * field.bits & (1 << field.bits) - 1) << field.low_bit
            assert code == int(channels.codes[channel, token])
    assert not any(record[layout.payload_bytes :])


@every_layout
def test_values_come_back_within_half_a_step(layout):
    rows = random_rows(layout, 2)
    restored = decode_latents(encode_latents(rows, layout), layout)
    for got, want, bits in zip(restored, rows, (layout.latent_bits, layout.rope_bits), strict=True):
        if bits == 16:
            assert torch.equal(got, want.half().float())
            continue
        channels = quantise_channels(want, bits)
        assert torch.equal(got, channels.restore().transpose(-1, -2))
        if bits > 2:  # coarser codes are clipped
            assert ((got - want).abs() <= 0.51 * channels.scale.float()[..., None, :] + 1e-3 * want.abs()).all()


@every_layout
def test_zero_bytes_restore_to_zeros_and_a_nan_harms_only_its_own_tile(layout):
    for part in decode_latents(torch.zeros(layout.record_bytes, dtype=torch.uint8), layout):
        assert not part.any()
    rows = random_rows(layout, 3)
    clean = encode_latents(LatentRows(*(x[[0, 2]] for x in rows)), layout)
    for x in rows:
        x[1, 3] = torch.nan
    assert torch.equal(encode_latents(rows, layout)[[0, 2]], clean)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"latent_dim": 96}, "latent_dim 96"),
        ({"rope_dim": 8}, "rope_dim 8"),
        ({"tile_tokens": 32}, "tile_tokens 32"),
        ({"latent_bits": 5}, "5-bit"),
        ({"rope_bits": 4}, "rope_bits 4"),
    ],
)
def test_other_widths_are_refused(change, word):
    good = {"latent_dim": 512, "rope_dim": 64, "tile_tokens": 128, "latent_bits": 4}
    with pytest.raises(ValueError, match=word):
        LatentLayout(**{**good, **change})


def test_identities_tell_layouts_apart():
    every = {*LAYOUTS.values(), *(LatentLayout(dim, 64, 128, 4) for dim in LATENT_DIMS)}
    assert len({layout.identity for layout in every}) == len(every)


@pytest.mark.parametrize(("rope_bits", "ratio"), [("16", 2.8), ("8", 3.3)])
def test_deepseek_v2_lite_holds_as_many_tokens_as_promised(rope_bits, ratio, monkeypatch):
    """27 layers, 64 requests on 40 GiB, their tails and sinks counted; and what is planned is what is allocated."""
    monkeypatch.setenv("KVARN_ROPE_BITS", rope_bits)
    shape = latent_shape(PRESET, layers=27, latent_dim=512, rope_dim=64, raw_bytes=2)
    assert isinstance(shape, LatentShape)
    plan = plan_capacity(shape, 40 << 30, 64)
    assert plan.ratio >= ratio
    layer = allocate_layer(
        CacheConfig.of(shape), plan.tokens // 128 + 1, 65, shape.sink_slots(64), torch.bfloat16, "meta"
    )
    allocated = 27 * (layer.records.nbytes + layer.tails.nbytes + layer.sinks.nbytes)
    assert allocated == plan.token_bytes + plan.fixed_bytes
