"""`kvarn presets`: what there is, and what a token costs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("presets", help="list the cache dtypes")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print a line a preset."""
    from kvarn.core.layout import TileLayout
    from kvarn.presets import PRESETS

    print(f"{'preset':18}{'key bits':>9}{'value bits':>11}{'tile':>6}{'bytes':>8}{'fp16 / bytes':>14}")
    for name, preset in PRESETS.items():
        each = TileLayout.of(preset, args.head_dim).record_bytes / preset.tile_tokens
        bits = f"{preset.key_bits:9}{preset.value_bits:11}{preset.tile_tokens:6}"
        print(f"{name:18}{bits}{each:8.1f}{4 * args.head_dim / each:14.2f}")
