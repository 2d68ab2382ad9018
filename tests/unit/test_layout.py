"""core.layout: every byte of a record has one meaning, and packing is its own inverse."""

import itertools
import random
import struct

import pytest
import torch

from kvarn.core.cache import CacheConfig, allocate_layer, layer_bytes
from kvarn.core.layout import FORMAT_VERSION, HEAD_DIMS, Field, TileLayout
from kvarn.core.reference import QuantisedRows, pack_codes, pack_record, unpack_codes, unpack_record
from kvarn.presets import PRESETS, get_preset

LAYOUTS = {f"{name}-d{dim}": TileLayout.of(preset, dim) for name, preset in PRESETS.items() for dim in HEAD_DIMS}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
VECTORS = ("k_scale", "k_offset", "v_scale", "v_offset")

# Bytes of K and V of one head's tile: (head_dim, tile, key bits, value bits). Codes, and 4 bytes for each of
# head_dim channels a group of 64 tokens and for each token.
KNOWN_BYTES = {
    (128, 128, 2, 2): 9_728, (128, 128, 4, 2): 13_824, (128, 128, 3, 3): 13_824, (128, 128, 4, 3): 15_872,
    (128, 128, 4, 4): 17_920, (128, 128, 8, 4): 26_112, (128, 64, 2, 2): 4_864, (128, 64, 4, 2): 6_912,
    (128, 64, 4, 4): 8_960, (64, 128, 4, 2): 7_168, (64, 64, 4, 2): 3_584, (256, 128, 2, 2): 18_944,
    (256, 128, 4, 2): 27_136, (256, 128, 4, 4): 35_328, (256, 64, 4, 2): 13_568, (256, 64, 4, 4): 17_664,
    (512, 128, 4, 2): 53_760, (512, 128, 4, 4): 70_144,
}  # fmt: skip


def lengths(layout: TileLayout) -> dict[str, int]:
    """Elements of each vector."""
    keys, tokens = layout.key_groups * layout.head_dim, layout.tile_tokens
    return dict(zip(VECTORS, (keys, keys, tokens, tokens), strict=True))


def offsets(layout: TileLayout) -> dict[str, int]:
    return {name: getattr(layout, f"{name}_offset") for name in VECTORS}


def word_bytes(fields: tuple[Field, ...], rows: int) -> list[tuple[int, int]]:
    """Byte ranges of the fields' words."""
    return [(field.offset_bytes, field.offset_bytes + 2 * rows * field.words) for field in fields]


def read_code(record: bytes, fields: tuple[Field, ...], row: int, lane: int) -> int:
    """Read one code bit by bit, as the module's docstring describes it."""
    code, low_bit = 0, 0
    for field in fields:
        words = field.words
        plane, column = lane // words, lane % words
        at = field.offset_bytes + 2 * (row * words + column)
        word = record[at] | record[at + 1] << 8
        code |= (word >> plane * field.bits & (1 << field.bits) - 1) << low_bit
        low_bit += field.bits
    return code


def random_tile(layout: TileLayout, seed: int) -> tuple[QuantisedRows, QuantisedRows]:
    """Random codes with every extreme among them, and random vectors."""
    generator = torch.Generator().manual_seed(seed)
    tiles = []
    keys = (layout.key_groups, layout.head_dim, layout.tile_tokens // layout.key_groups)
    for shape, bits in ((keys, layout.key_bits), ((layout.tile_tokens, layout.head_dim), layout.value_bits)):
        codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.int32)
        codes[..., 0, :], codes[..., 1, :], codes[..., 0], codes[..., 2, ::2] = 0, 2**bits - 1, 2**bits - 1, 0
        tiles.append(QuantisedRows(codes, *(torch.randn(shape[:-1], generator=generator).half() for _ in range(2))))
    return tiles[0], tiles[1]


@every_layout
def test_packed_unpacked_packed_is_the_identity(layout: TileLayout) -> None:
    for seed in range(3):
        key, value = random_tile(layout, seed)
        record = pack_record(key, value, layout)
        assert record.dtype == torch.uint8
        assert record.shape == (layout.record_bytes,)
        for got, want in zip(unpack_record(record, layout), (key, value), strict=True):
            assert torch.equal(got.codes, want.codes)
            for name in ("scale", "offset"):
                assert torch.equal(getattr(got, name), getattr(want, name))
        assert torch.equal(pack_record(*unpack_record(record, layout), layout), record)


@every_layout
def test_any_bytes_survive_unpacking_and_packing(layout: TileLayout) -> None:
    """Every bit of the payload carries information; NaN patterns of the vectors keep their bits."""
    records = torch.randint(0, 256, (3, layout.record_bytes), dtype=torch.uint8)
    records[1], records[2] = 0xFF, 0
    records[:, layout.payload_bytes :] = 0
    key, value = unpack_record(records, layout)
    assert torch.equal(pack_record(key, value, layout), records)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_constant_code_round_trips(bits: int) -> None:
    layout = TileLayout(64, 64, bits, bits)
    codes = torch.arange(2**bits, dtype=torch.int32)[:, None, None].expand(-1, 64, 64)
    words = pack_codes(codes, layout.key_fields)
    assert torch.equal(unpack_codes(words, layout.key_fields, 64), codes)


@every_layout
def test_codes_stand_where_the_docstring_says(layout: TileLayout) -> None:
    key, value = random_tile(layout, 5)
    record = bytes(pack_record(key, value, layout).tolist())
    key_codes = key.codes.transpose(-1, -2).flatten(0, 1)
    pick = random.Random(3)
    for _ in range(300):
        token, channel = pick.randrange(layout.tile_tokens), pick.randrange(layout.head_dim)
        assert read_code(record, layout.key_fields, token, channel) == int(key_codes[token, channel])
        assert read_code(record, layout.value_fields, channel, token) == int(value.codes[token, channel])


@every_layout
def test_vectors_stand_where_their_offsets_say(layout: TileLayout) -> None:
    key, value = random_tile(layout, 6)
    record = bytes(pack_record(key, value, layout).tolist())
    parts = (key.scale.flatten(), key.offset.flatten(), value.scale, value.offset)
    for vector, (name, offset) in zip(parts, offsets(layout).items(), strict=True):
        assert vector.tolist() == list(struct.unpack_from(f"<{lengths(layout)[name]}e", record, offset))


@every_layout
def test_sections_fill_the_payload_without_overlap(layout: TileLayout) -> None:
    sections = word_bytes(layout.key_fields, layout.tile_tokens) + word_bytes(layout.value_fields, layout.head_dim)
    sections += [(offset, offset + 2 * lengths(layout)[name]) for name, offset in offsets(layout).items()]
    assert sum(end - begin for begin, end in sections) == layout.payload_bytes
    sections.sort()
    assert sections[0][0] == 0
    assert sections[-1][1] == layout.payload_bytes
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(sections))


@every_layout
def test_fields_spell_the_whole_code(layout: TileLayout) -> None:
    for fields, bits, lanes in (
        (layout.key_fields, layout.key_bits, layout.head_dim),
        (layout.value_fields, layout.value_bits, layout.tile_tokens),
    ):
        assert sum(field.bits for field in fields) == bits
        assert [field.low_bit for field in fields] == [0, *itertools.accumulate(f.bits for f in fields)][:-1]
        assert all(field.bits * field.planes == 16 and field.words * field.planes == lanes for field in fields)


def test_three_bits_are_two_low_ones_and_a_high_one() -> None:
    layout = TileLayout.of(get_preset("kvarn_k3v3_g128"), 128)
    for fields in (layout.key_fields, layout.value_fields):
        assert [(field.bits, field.low_bit, field.words) for field in fields] == [(2, 0, 16), (1, 2, 8)]


@every_layout
def test_record_is_the_payload_rounded_up_to_128_bytes(layout: TileLayout) -> None:
    assert layout.record_bytes % 128 == 0
    assert 0 <= layout.record_bytes - layout.payload_bytes < 128


@pytest.mark.parametrize(("shape", "record_bytes"), KNOWN_BYTES.items(), ids=map(str, KNOWN_BYTES))
def test_record_bytes_of_known_shapes(shape: tuple[int, int, int, int], record_bytes: int) -> None:
    layout = TileLayout(*shape)
    assert layout.payload_bytes == record_bytes
    assert layout.record_bytes == record_bytes


def test_default_preset_costs_108_bytes_a_token_and_head() -> None:
    layout = TileLayout.of(get_preset("kvarn_k4v2_g128"), 128)
    assert layout.record_bytes == 13_824 == 108 * layout.tile_tokens


def test_wide_heads_are_not_padded_to_a_power_of_two() -> None:
    assert TileLayout(256, 128, 4, 4).record_bytes == 276 * 128


def test_cache_beyond_2_gib_is_counted_in_full() -> None:
    """Sizes and the last record's address pass 2**31 and 2**32 without wrapping; nothing is allocated."""
    layout = TileLayout.of(get_preset("kvarn_k4v2_g128"), 128)
    config = CacheConfig(layout, 8, 128, 4, 256)
    pages, rows, slots = 50_001, 65, 512
    layer = allocate_layer(config, pages, rows, slots, torch.bfloat16, "meta")
    last = sum((size - 1) * stride for size, stride in zip(layer.records.shape, layer.records.stride(), strict=True))
    assert last == pages * 8 * 13_824 - 1
    assert last > 2**32
    raw = 2 * 8 * 128 * 2
    assert sum(layer_bytes(layer)) == pages * 8 * 13_824 + rows * 256 * raw + slots * 4 * raw


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((80, 128, 4, 2), "head_dim 80"),
        ((0, 128, 4, 2), "head_dim 0"),
        ((128, 32, 4, 2), "tile_tokens 32"),
        ((128, 128, 5, 2), "5-bit"),
        ((128, 128, 4, 1), "1-bit"),
    ],
)
def test_impossible_shape_is_refused_with_the_possible_ones(shape: tuple[int, int, int, int], said: str) -> None:
    with pytest.raises(ValueError, match=rf"{said}.*supported are"):
        TileLayout(*shape)


def test_identity_differs_wherever_bytes_differ() -> None:
    assert len({layout.identity for layout in LAYOUTS.values()}) == len(LAYOUTS)
    assert all(layout.identity.startswith(f"kvarn{FORMAT_VERSION}-") for layout in LAYOUTS.values())
