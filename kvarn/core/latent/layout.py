"""LatentLayout: where every byte of a latent record stands. The only place that computes an offset in one.

Multi-head latent attention (MLA) caches one row a token for all heads: the *latent*, from which keys and values of
every head follow, and the *rope part*, a key that carries the position. Attention with absorbed weights takes the
latent as key and as value, so a record holds it once: codes, scales and offsets, then the rope part, padded to 128
bytes.

Codes are packed as in `core.layout`: rows are tokens, lanes are channels. Values are restored as
``latent[t, c] = code * scale[c] + offset[c]``. The rope part is fp16 or, with 8 bits, restored in the same way.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kvarn.core.layout import (
    SCALE_BYTES,
    Field,
    aligned,
    check_bits,
    check_tile_tokens,
    code_fields,
    field_constants,
)
from kvarn.presets import Preset

LATENT_FORMAT_VERSION = 2
LATENT_DIMS = (128, 256, 512)
ROPE_DIMS = (16, 32, 64, 128)
ROPE_BITS = (16, 8)

_RAW_ROPE_BITS = 16


@dataclass(frozen=True, slots=True)
class LatentLayout:
    """Byte layout of one latent record.

    Args:
        latent_dim: channels of the latent (``kv_lora_rank``); one of LATENT_DIMS.
        rope_dim: channels of the rope part (``qk_rope_head_dim``); one of ROPE_DIMS.
        tile_tokens: tokens of a tile.
        latent_bits: bits of a latent's code.
        rope_bits: 16 for fp16, or 8 for codes.
    """

    latent_dim: int
    rope_dim: int
    tile_tokens: int
    latent_bits: int
    rope_bits: int = _RAW_ROPE_BITS

    def __post_init__(self) -> None:
        for name, value, known in (
            ("latent_dim", self.latent_dim, LATENT_DIMS),
            ("rope_dim", self.rope_dim, ROPE_DIMS),
            ("rope_bits", self.rope_bits, ROPE_BITS),
        ):
            if value not in known:
                raise ValueError(f"{name} {value} has no layout; supported are {known}.")
        check_tile_tokens(self.tile_tokens)
        check_bits(self.latent_bits)

    @classmethod
    def of(cls, preset: Preset, latent_dim: int, rope_dim: int, rope_bits: int = _RAW_ROPE_BITS) -> "LatentLayout":
        """Return the layout of a preset. A latent is a key to the logits, so it gets the bits of keys."""
        return cls(latent_dim, rope_dim, preset.tile_tokens, preset.key_bits, rope_bits)

    @classmethod
    def of_row(cls, preset: Preset, row_dim: int, rope_bits: int = _RAW_ROPE_BITS) -> "LatentLayout":
        """Return the layout of a preset, given the width of latent and rope part together: no two layouts share it.

        Raises:
            ValueError: no layout has rows of this width.
        """
        for latent_dim in LATENT_DIMS:
            if row_dim - latent_dim in ROPE_DIMS:
                return cls.of(preset, latent_dim, row_dim - latent_dim, rope_bits)
        raise ValueError(f"Latents of {row_dim} channels, rope part included, have no layout.")

    @property
    def head_dim(self) -> int:
        """Channels of a value: those of the latent."""
        return self.latent_dim

    @property
    def padded_dim(self) -> int:
        """Width of a latent inside a kernel."""
        return self.latent_dim

    @property
    def row_dim(self) -> int:
        """Numbers of a raw row: the latent, then the rope part."""
        return self.latent_dim + self.rope_dim

    @property
    def raw_shape(self) -> tuple[int, int]:
        """Raw rows of a token, and the numbers of one."""
        return 1, self.row_dim

    @property
    def latent_fields(self) -> tuple[Field, ...]:
        """Fields of a latent's code, low bits first."""
        return code_fields(self.latent_bits, self.latent_dim, self.tile_tokens, 0)

    @property
    def latent_scale_offset(self) -> int:
        """Byte of the latent's scales, [latent_dim] fp16."""
        return self.tile_tokens * self.latent_dim * self.latent_bits // 8

    @property
    def latent_offset_offset(self) -> int:
        """Byte of the latent's offsets, [latent_dim] fp16."""
        return self.latent_scale_offset + self.latent_dim * SCALE_BYTES

    @property
    def rope_start(self) -> int:
        """Byte of the rope part: [tile_tokens, rope_dim] fp16, or its codes."""
        return self.latent_offset_offset + self.latent_dim * SCALE_BYTES

    @property
    def rope_fields(self) -> tuple[Field, ...]:
        """Fields of a code of the rope part; none if it is fp16."""
        if self.rope_bits == _RAW_ROPE_BITS:
            return ()
        return code_fields(self.rope_bits, self.rope_dim, self.tile_tokens, self.rope_start)

    @property
    def rope_scale_offset(self) -> int:
        """Byte of the rope part's scales, [rope_dim] fp16, where it has codes."""
        return self.rope_start + self.tile_tokens * self.rope_dim * self.rope_bits // 8

    @property
    def rope_offset_offset(self) -> int:
        """Byte of the rope part's offsets, [rope_dim] fp16, where it has codes."""
        return self.rope_scale_offset + self.rope_dim * SCALE_BYTES

    @property
    def payload_bytes(self) -> int:
        """Bytes of a record that carry information."""
        return self.rope_offset_offset + self.rope_dim * SCALE_BYTES if self.rope_fields else self.rope_scale_offset

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, a multiple of 128."""
        return aligned(self.payload_bytes)

    @property
    def identity(self) -> str:
        """Name of format and geometry; part of every key that leaves the process."""
        widths = f"l{self.latent_bits}r{self.rope_bits}g{self.tile_tokens}"
        return f"kvarn-latent{LATENT_FORMAT_VERSION}-{widths}d{self.latent_dim}+{self.rope_dim}"


@functools.lru_cache(maxsize=32)
def latent_constants(layout: LatentLayout) -> Mapping[str, Any]:
    """Return the compile-time constants by which kernels find their way in a latent record."""
    constants = {
        "LATENT": layout.latent_dim,
        "ROPE": layout.rope_dim,
        "G": layout.tile_tokens,
        "FIELDS": field_constants(layout.latent_fields),
        "SCALES": (layout.latent_scale_offset, layout.latent_offset_offset),
        "ROPE_START": layout.rope_start,
        "ROPE_FIELDS": field_constants(layout.rope_fields),
        "ROPE_SCALES": (layout.rope_scale_offset, layout.rope_offset_offset),
    }
    return MappingProxyType(constants)
