"""core.reference against an independent float64 implementation in plain loops."""

import math
from collections.abc import Callable

import pytest
import torch

from kvarn.core.layout import HEAD_DIMS, KEY_GROUP_TOKENS, TileLayout
from kvarn.core.reference import (
    SCALE_MAX,
    QuantisedRows,
    decode_record,
    encode,
    quantise_rows,
    quantise_tile,
    quantise_values,
    softmax_attention,
    value_clip,
)
from kvarn.presets import PRESETS, Preset, get_preset

# One unit in the last place of fp16, relative; and its smallest step, absolute.
FP16_ULP, FP16_TINY = 2.0**-10, 2.0**-24
# Share of the range that codes span, chosen by KL on real models: of keys by bits, and of values of 64 channels.
KEY_CLIPS = {2: 0.80, 3: 1.0, 4: 1.0, 8: 1.0}
VALUE_CLIPS = {2: 0.722, 3: 0.855, 4: 1.0, 8: 1.0}


def tile(kind: str, rows: int = 64, cols: int = 48, seed: int = 0) -> torch.Tensor:
    """An oriented tile of some character, float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    if kind == "uneven":
        x *= torch.exp(0.6 * torch.randn(rows, 1, generator=generator))
        x *= torch.exp(0.6 * torch.randn(1, cols, generator=generator))
    if kind == "offset rows":
        x += 12.0 * torch.randn(rows, 1, generator=generator)
    if kind == "small":
        x *= 0.02 * torch.exp(torch.randn(1, cols, generator=generator))
    if kind == "outliers":
        x[:, 3] *= 40.0
        x[7] *= 15.0
    return x


KINDS = ("even", "uneven", "offset rows", "small", "outliers")


KINDS = ("even", "uneven", "offset rows", "small", "outliers")


def row_scale_64(row: list[float], bits: int, clip: float) -> tuple[float, float]:
    """Scale and offset by which codes span a share of a row's range, about its centre."""
    low, high = min(row), max(row)
    reach = (high - low) * clip / 2
    return 2 * reach / (2**bits - 1), (low + high) / 2 - reach


def nearest_code_64(value: float, scale: float, offset: float, bits: int) -> int:
    if scale == 0:
        return 0
    return min(range(2**bits), key=lambda code: abs(code * scale + offset - value))


def relative_error(tiles: QuantisedRows, x: torch.Tensor) -> float:
    return float((tiles.restore().double() - x.double()).norm() / x.double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.8])
def test_vectors_and_codes_are_those_of_float64(kind: str, bits: int, clip: float) -> None:
    """Scale and offset to an fp16 step, codes the nearest there are."""
    x = tile(kind, seed=bits)
    got = quantise_rows(x, bits, clip)
    moved = off = 0
    for r, row in enumerate(x.tolist()):
        scale, offset = row_scale_64(row, bits, clip)
        assert float(got.scale[r]) == pytest.approx(scale, rel=FP16_ULP, abs=FP16_TINY)
        assert float(got.offset[r]) == pytest.approx(offset, rel=FP16_ULP, abs=FP16_TINY)
        codes = [nearest_code_64(v, float(got.scale[r]), float(got.offset[r]), bits) for v in row]
        moved += sum(abs(a - b) for a, b in zip(codes, got.codes[r].tolist(), strict=True))
        off = max(off, *(abs(a - b) for a, b in zip(codes, got.codes[r].tolist(), strict=True)))
    assert off <= 1
    assert moved <= 0.001 * x.numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_are_clipped_and_keep_their_length(kind: str, bits: int) -> None:
    """Codes are of a clipped grid, the scale makes the error orthogonal to the row, both about the range's middle."""
    x = tile(kind, seed=bits)
    got = quantise_values(x, bits, VALUE_CLIPS[bits])
    moved = 0
    for r, row in enumerate(x.tolist()):
        middle = (min(row) + max(row)) / 2
        codes = [nearest_code_64(v, *row_scale_64(row, bits, VALUE_CLIPS[bits]), bits) for v in row]
        moved += sum(abs(a - b) for a, b in zip(codes, got.codes[r].tolist(), strict=True))
        squares = sum((v - middle) ** 2 for v in row)
        scale = squares / sum((v - middle) * (code - (2**bits - 1) / 2) for v, code in zip(row, codes, strict=True))
        offset = middle - scale * (2**bits - 1) / 2
        assert float(got.scale[r]) == pytest.approx(scale, rel=3 * FP16_ULP)
        assert float(got.offset[r]) == pytest.approx(offset, rel=FP16_ULP, abs=3 * FP16_ULP * 2**bits * scale)
    assert moved <= 0.001 * x.numel()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_wider_rows_are_clipped_more(bits: int) -> None:
    """Their largest channel is farther out, and the range is measured by it."""
    assert value_clip(bits, 64) == pytest.approx(VALUE_CLIPS[bits], abs=1e-3)
    clips = [value_clip(bits, head_dim) for head_dim in HEAD_DIMS]
    assert clips == sorted(clips, reverse=True)
    for head_dim, clip in zip(HEAD_DIMS, clips, strict=True):
        drawn = torch.randn(4096, head_dim, generator=torch.Generator().manual_seed(head_dim))
        reach = clip * float(drawn.amax(dim=-1).mean())
        assert clip == 1.0 or reach == pytest.approx({2: 1.69, 3: 2.0, 4: 2.5}[bits], rel=0.01)


def test_values_get_the_same_bits_in_any_order_of_channels() -> None:
    """Threads add in an order of their own, and a record mustn't depend on how many there are."""
    x = 3.0 * tile("uneven", 256, 512)
    shuffled = torch.randperm(512, generator=torch.Generator().manual_seed(1))
    got, want = (quantise_values(rows, 2, 0.72) for rows in (x[:, shuffled], x))
    assert torch.equal(got.codes, want.codes[:, shuffled])
    assert torch.equal(got.scale, want.scale)
    assert torch.equal(got.offset, want.offset)


@pytest.mark.parametrize("amplitude", [2.0**-10, 1.0, 2.0**9])
@pytest.mark.parametrize(("bits", "gaussian"), [(2, 0.50), (4, 0.10), (8, 0.0059)])
def test_error_is_that_of_a_uniform_grid_at_any_amplitude(amplitude: float, bits: int, gaussian: float) -> None:
    """128 normal numbers span 5.2 standard deviations; a step of 5.2 / levels leaves that over sqrt(12)."""
    x = amplitude * tile("even", 256, 128)
    error = relative_error(quantise_rows(x, bits, 1.0), x)
    assert error == pytest.approx(gaussian, rel=0.05)


def test_a_range_beyond_the_largest_scale_is_clipped_about_its_centre() -> None:
    x = torch.tensor([[-30000.0, -5.0, 5.0, 30000.0]])
    got = quantise_rows(x, 2, 1.0)
    assert got.scale.item() == SCALE_MAX
    assert got.restore().tolist() == [[-12000.0, -4000.0, 4000.0, 12000.0]]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_keys_are_scaled_by_channel_in_groups_and_values_by_token(preset: Preset, head_dim: int) -> None:
    layout = TileLayout.of(preset, head_dim)
    k, v = (tile("uneven", layout.tile_tokens, head_dim, seed) for seed in (1, 2))
    key, value = quantise_tile(k, v, layout)
    clip = KEY_CLIPS[layout.key_bits]
    wanted = [
        quantise_rows(k[first : first + KEY_GROUP_TOKENS].T, layout.key_bits, clip)
        for first in range(0, layout.tile_tokens, KEY_GROUP_TOKENS)
    ]
    want = quantise_values(v, layout.value_bits, value_clip(layout.value_bits, head_dim))
    for name in ("codes", "scale", "offset"):
        assert torch.equal(getattr(key, name), torch.stack([getattr(group, name) for group in wanted]))
        assert torch.equal(getattr(value, name), getattr(want, name))
    restored = decode_record(encode(k, v, layout), layout)
    assert torch.equal(restored[0], torch.cat([group.restore().T for group in wanted]))
    assert torch.equal(restored[1], want.restore())


EXTREMES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "one constant": lambda x: torch.full_like(x, 3.7),
    "constant tokens": lambda x: torch.linspace(-5, 5, x.shape[0])[:, None].expand_as(x),
    "constant channels": lambda x: torch.linspace(-5, 5, x.shape[1]).expand_as(x),
    "one outlier of 10,000": lambda x: x.index_put((torch.tensor(5), torch.tensor(9)), torch.tensor(1e4)),
    "one element": lambda x: torch.zeros_like(x).index_put((torch.tensor(5), torch.tensor(9)), torch.tensor(1.0)),
    "plus and minus the largest fp16": lambda x: torch.sign(x) * 65504.0,
    "fp16 denormals": lambda x: (x * 2e-7).half().float(),
    "one zero token": lambda x: x.index_fill(0, torch.tensor(3), 0.0),
    "one zero channel": lambda x: x.index_fill(1, torch.tensor(3), 0.0),
}
# Two-bit codes keep half of Gaussian noise; everything above is easier, except codes far from an outlier.
_LARGEST_ERROR = 1.0


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("change", EXTREMES.values(), ids=EXTREMES)
def test_finite_rows_give_finite_values_near_them(
    change: Callable[[torch.Tensor], torch.Tensor], preset: Preset
) -> None:
    layout = TileLayout.of(preset, 64)
    x = change(tile("even", layout.tile_tokens, 64))
    for restored in decode_record(encode(x, x, layout), layout):
        assert torch.isfinite(restored).all()
        assert (restored - x).norm() <= _LARGEST_ERROR * x.norm()


@pytest.mark.parametrize("name", ["zeros", "one constant"])
def test_constant_tiles_are_kept(name: str) -> None:
    layout = TileLayout.of(get_preset("kvarn_k2v2_g128"), 128)
    x = EXTREMES[name](tile("even", 128, 128))
    for restored in decode_record(encode(x, x, layout), layout):
        assert torch.allclose(restored, x, rtol=2 * FP16_ULP, atol=0)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_zero_bytes_restore_to_zeros(preset: Preset) -> None:
    layout = TileLayout.of(preset, 128)
    for restored in decode_record(torch.zeros(2, layout.record_bytes, dtype=torch.uint8), layout):
        assert torch.equal(restored, torch.zeros(2, layout.tile_tokens, 128))


def test_nan_token_harms_only_its_own_tile() -> None:
    layout = TileLayout.of(get_preset("kvarn_k4v2_g64"), 64)
    x = torch.stack([tile("even", 64, 64, seed) for seed in range(3)])
    clean = encode(x[[0, 2]], x[[0, 2]], layout)
    x[1, 5] = float("nan")
    assert torch.equal(encode(x, x, layout)[[0, 2]], clean)


@pytest.mark.parametrize("logit_cap", [0.0, 2.0])
@pytest.mark.parametrize("sinks", [None, [-1e4, -0.5, 1.5, 50.0]])
def test_attention_is_that_of_plain_loops(logit_cap: float, sinks: list[float] | None) -> None:
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(3, 4, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 5, 2, 8, generator=generator, dtype=torch.float64)
    visible = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    sink_logits = None if sinks is None else torch.tensor(sinks)
    out, lse = softmax_attention(q, k, v, visible, 0.7, logit_cap, sink_logits)
    for row in range(2):
        for head in range(4):
            seen = [p for p in range(5) if visible[row, p]]
            logits = [
                0.7 * sum(float(a) * float(b) for a, b in zip(q[row, head], k[p, head // 2], strict=True)) for p in seen
            ]
            logits = [logit_cap * math.tanh(x / logit_cap) for x in logits] if logit_cap else logits
            total = sum(math.exp(x) for x in [*logits, *([] if sinks is None else [sinks[head]])])
            want = [
                sum(math.exp(x) * float(v[p, head // 2, d]) for x, p in zip(logits, seen, strict=True)) / total
                for d in range(8)
            ]
            assert out[row, head].tolist() == pytest.approx(want, abs=1e-12)
            assert float(lse[row, head]) == pytest.approx(math.log(total), abs=1e-12)
    assert not out[2].any()
    nothing = torch.full((4,), -math.inf) if sink_logits is None else sink_logits
    assert torch.equal(lse[2], nothing.double())
