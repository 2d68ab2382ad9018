"""TileLayout: where every byte of a record stands. The only place that computes an offset.

A *record* holds one tile (``tile_tokens`` tokens x ``head_dim`` channels of one kv head): K codes, K scales and
offsets, V codes, V scales and offsets, in that order, padded to 128 bytes.

Codes are **plane-packed 16-bit words**: bit plane j of a word belongs to a lane that stands j * words apart, so a
reader masks a whole row of words and gets a contiguous slice of lanes, with no interleave.

- K rows are tokens, lanes are channels: plane j of word c is channel ``j * words + c``.
- V rows are channels, lanes are tokens: plane j of word w is token ``j * words + w``.

Widths that don't divide 16 are split into *fields* that do: a 3-bit code is a 2-bit field (its low bits) followed
by a 1-bit field (its high bit), each with words of its own.

Values are restored as ``K[t, d] = code * k_scale[t // 64, d] + k_offset[t // 64, d]`` and
``V[t, d] = code * v_scale[t] + v_offset[t]``, scales and offsets in fp16.
"""

from dataclasses import dataclass

from kvarn.presets import Preset

FORMAT_VERSION = 3
HEAD_DIMS = (64, 96, 128, 192, 256, 512)
# Tokens that share the scale and the offset of a key channel.
KEY_GROUP_TOKENS = 64

_TILE_TOKENS = (64, 128)
_WORD_BITS = 16
_WORD_BYTES = 2
SCALE_BYTES = 2
_ALIGN_BYTES = 128
_FIELDS_OF_WIDTH = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


@dataclass(frozen=True, slots=True)
class Field:
    """One power-of-two wide part of a code and where its words stand.

    Args:
        bits: width of the part.
        low_bit: position of the part inside the code (its weight is ``2 ** low_bit``).
        offset_bytes: first byte of its words inside the record.
        words: 16-bit words of one row (token for K, channel for V).
    """

    bits: int
    low_bit: int
    offset_bytes: int
    words: int

    @property
    def planes(self) -> int:
        """Bit planes of one word."""
        return _WORD_BITS // self.bits


@dataclass(frozen=True, slots=True)
class TileLayout:
    """Byte layout of one record.

    Args:
        head_dim: channels of one head; one of HEAD_DIMS.
        tile_tokens: tokens of a tile.
        key_bits: bits of a key code.
        value_bits: bits of a value code.
    """

    head_dim: int
    tile_tokens: int
    key_bits: int
    value_bits: int

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim {self.head_dim} has no layout; supported are {HEAD_DIMS}.")
        check_tile_tokens(self.tile_tokens)
        for bits in (self.key_bits, self.value_bits):
            check_bits(bits)

    @classmethod
    def of(cls, preset: Preset, head_dim: int) -> "TileLayout":
        """Return the layout of a preset at a head width."""
        return cls(head_dim, preset.tile_tokens, preset.key_bits, preset.value_bits)

    @property
    def padded_dim(self) -> int:
        """head_dim rounded up to a power of two: the width of a row inside a kernel."""
        return 1 << (self.head_dim - 1).bit_length()

    @property
    def key_fields(self) -> tuple[Field, ...]:
        """Fields of a key code, low bits first."""
        return code_fields(self.key_bits, self.head_dim, self.tile_tokens, 0)

    @property
    def value_fields(self) -> tuple[Field, ...]:
        """Fields of a value code, low bits first."""
        return code_fields(self.value_bits, self.tile_tokens, self.head_dim, self.value_codes_offset)

    @property
    def key_groups(self) -> int:
        """Groups of tokens whose keys have scales and offsets of their own."""
        return self.tile_tokens // KEY_GROUP_TOKENS

    @property
    def k_scale_offset(self) -> int:
        """Byte of the K scales, [key_groups, head_dim] fp16."""
        return self.head_dim * self.tile_tokens * self.key_bits // 8

    @property
    def k_offset_offset(self) -> int:
        """Byte of the K offsets, [key_groups, head_dim] fp16."""
        return self.k_scale_offset + self.key_groups * self.head_dim * SCALE_BYTES

    @property
    def value_codes_offset(self) -> int:
        """Byte of the first V word."""
        return self.k_offset_offset + self.key_groups * self.head_dim * SCALE_BYTES

    @property
    def v_scale_offset(self) -> int:
        """Byte of the V scale, one fp16 a token."""
        return self.value_codes_offset + self.head_dim * self.tile_tokens * self.value_bits // 8

    @property
    def v_offset_offset(self) -> int:
        """Byte of the V offset, one fp16 a token."""
        return self.v_scale_offset + self.tile_tokens * SCALE_BYTES

    @property
    def payload_bytes(self) -> int:
        """Bytes of a record that carry information."""
        return self.v_offset_offset + self.tile_tokens * SCALE_BYTES

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, a multiple of 128."""
        return aligned(self.payload_bytes)

    @property
    def raw_shape(self) -> tuple[int, int]:
        """Raw rows of a token and kv head, a key's and a value's, and the numbers of one."""
        return 2, self.head_dim

    @property
    def identity(self) -> str:
        """Name of format and geometry; part of every key that leaves the process."""
        return f"kvarn{FORMAT_VERSION}-k{self.key_bits}v{self.value_bits}g{self.tile_tokens}d{self.head_dim}"


def code_fields(bits: int, lanes: int, rows: int, offset_bytes: int) -> tuple[Field, ...]:
    """Return where the words of a matrix of codes stand: the parts of a code, low bits first.

    Args:
        bits: width of a code.
        lanes: codes of a row.
        rows: of the matrix.
        offset_bytes: first byte of the words inside the record.
    """
    fields = []
    low_bit = 0
    for width in _FIELDS_OF_WIDTH[bits]:
        words = lanes * width // _WORD_BITS
        fields.append(Field(width, low_bit, offset_bytes, words))
        offset_bytes += rows * words * _WORD_BYTES
        low_bit += width
    return tuple(fields)


def field_constants(fields: tuple[Field, ...]) -> tuple[tuple[int, int, int, int], ...]:
    """Return what kernels know of each field: bits, low bit, first byte and words of a row."""
    return tuple((f.bits, f.low_bit, f.offset_bytes, f.words) for f in fields)


def aligned(payload_bytes: int) -> int:
    """Return the bytes of a record that carries so many."""
    return -(-payload_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


def check_bits(bits: int) -> None:
    """Raise ValueError unless codes of that width can be packed."""
    if bits not in _FIELDS_OF_WIDTH:
        raise ValueError(f"{bits}-bit codes have no layout; supported are {sorted(_FIELDS_OF_WIDTH)}.")


def check_tile_tokens(tile_tokens: int) -> None:
    """Raise ValueError unless tiles may have so many tokens."""
    if tile_tokens not in _TILE_TOKENS:
        raise ValueError(f"tile_tokens {tile_tokens} has no layout; supported are 64 and 128.")
