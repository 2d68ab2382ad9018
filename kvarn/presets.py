"""The presets: cache dtype names and what they mean."""

import difflib
from dataclasses import dataclass
from types import MappingProxyType

from kvarn.errors import UnknownPreset

PREFIX = "kvarn_"


@dataclass(frozen=True, slots=True)
class Preset:
    """How a tile is quantised and which tokens stay exact.

    Args:
        name: the cache dtype a user types, e.g. ``kvarn_k4v2_g128``.
        key_bits: bits of a key code.
        value_bits: bits of a value code.
        tile_tokens: tokens of one tile, the unit of quantisation (G).
        tail_tokens: newest tokens that a query always reads exact (R).
        sink_tokens: first tokens of a request that stay exact (S).
    """

    name: str
    key_bits: int
    value_bits: int
    tile_tokens: int
    tail_tokens: int = 128
    sink_tokens: int = 4


def _table() -> dict[str, Preset]:
    menu = [(4, 2, 128), (4, 4, 128), (4, 2, 64), (4, 4, 64), (8, 4, 128), (4, 3, 128), (3, 3, 128), (2, 2, 128)]
    presets = (Preset(f"{PREFIX}k{k}v{v}_g{g}", k, v, g) for k, v, g in menu)
    return {preset.name: preset for preset in presets}


PRESETS = MappingProxyType(_table())


def is_preset_name(name: object) -> bool:
    """Tell whether a cache dtype is addressed to KVarN, valid or not."""
    return isinstance(name, str) and name.startswith(PREFIX)


def get_preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        UnknownPreset: lists the valid names and the nearest one.
    """
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
    raise UnknownPreset(f"Unknown KV cache dtype {name!r}: KVarN has {', '.join(PRESETS)}. Did you mean {nearest!r}?")
