"""Whether kernels with explicit layouts serve a tile layout on a device, and how many query columns a program has."""

import functools
from typing import Any

import torch

from kvarn.core.launch import has_lop3
from kvarn.core.layout import TileLayout

# Query columns of one program; 8 is the narrow side of the MMA.
DECODE_COLUMNS = 8
# The most of tasks of several rows; and of drafts, whose warps share a tile, with explicit layouts and narrow heads.
VERIFY_COLUMNS, SHARED_COLUMNS = 16, 32
_SHARED_DIMS = (64, 128)
# What kernels with explicit layouts serve: head_dim, and words of a row of codes.
_WIDEST = 256
_FEWEST_WORDS = 8


def has_explicit_layouts(layout: TileLayout, device: torch.device) -> bool:
    """Return whether the kernel with explicit layouts (`kernels.gluon.attend`) serves a tile layout on a device.

    It needs an NVIDIA GPU, and rows of words that fill the rows of an MMA's operand without padding.
    """
    if not has_lop3(device):
        return False
    fields = (*layout.key_fields, *layout.value_fields)
    return layout.padded_dim == layout.head_dim <= _WIDEST and all(f.words >= _FEWEST_WORDS for f in fields)


def shares_tiles(layout: TileLayout, columns: int, rows: int, device: torch.device) -> bool:
    """Return whether a program's warps share tiles (`kernels.gluon.shared`): for wide tasks, and for several rows."""
    served = layout.head_dim in _SHARED_DIMS and has_explicit_layouts(layout, device)
    return served and (columns == SHARED_COLUMNS or (columns == VERIFY_COLUMNS and rows > 1))


def widest_columns(layout: Any, device: torch.device) -> int:
    """Return the most query columns of a program of attention over keys and values, in a verify step."""
    return SHARED_COLUMNS if shares_tiles(layout, SHARED_COLUMNS, 1, device) else VERIFY_COLUMNS


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Return whether a device is a GPU with the MMAs of Hopper's warp groups, which later ones don't have."""
    return has_lop3(device) and torch.cuda.get_device_capability(device)[0] == 9
