"""The oracle: quantise, pack and restore one tile of latents in plain torch, float32.

The latent is rotated whole: as a value it needs that, and as a key it may, because rotary embedding doesn't touch it.
So a bias is one constant a channel, which the offset takes.
"""

import torch

from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.rows import LatentRows
from kvarn.core.layout import Field
from kvarn.core.reference import QuantisedRows, key_clip, pack_codes, quantise_rows, unpack_codes


def quantise_channels(x: torch.Tensor, bits: int) -> QuantisedRows:
    """Quantise a tile with a scale and an offset a channel.

    Args:
        x: [..., tile_tokens, channels], float32.
        bits: width of a code.

    Returns:
        [..., channels] rows of the tile's tokens.
    """
    return quantise_rows(x.float().transpose(-1, -2), bits, key_clip(bits))


def encode_latents(rows: LatentRows, layout: LatentLayout) -> torch.Tensor:
    """Quantise and pack one tile: latents rotated, all within fp16; [..., record_bytes], uint8. Padding is zero."""
    parts = _channel_codes(quantise_channels(rows.latent, layout.latent_bits), layout.latent_fields)
    if layout.rope_fields:
        parts += _channel_codes(quantise_channels(rows.rope, layout.rope_bits), layout.rope_fields)
    else:
        parts.append(rows.rope.half().flatten(-2).contiguous().view(torch.uint8))
    record = torch.cat(parts, dim=-1)
    return torch.nn.functional.pad(record, (0, layout.record_bytes - layout.payload_bytes))


def decode_latents(record: torch.Tensor, layout: LatentLayout) -> LatentRows:
    """Restore the rows of records [..., record_bytes], uint8: float32, latents rotated."""
    latent = _restored(
        record, layout.latent_fields, layout.latent_scale_offset, layout.latent_offset_offset, layout.tile_tokens
    )
    if layout.rope_fields:
        rope = _restored(
            record, layout.rope_fields, layout.rope_scale_offset, layout.rope_offset_offset, layout.tile_tokens
        )
    else:
        raw = record[..., layout.rope_start : layout.rope_scale_offset].contiguous().view(torch.float16)
        rope = raw.reshape(*raw.shape[:-1], layout.tile_tokens, layout.rope_dim).float()
    return LatentRows(latent, rope)


def _channel_codes(channels: QuantisedRows, fields: tuple[Field, ...]) -> list[torch.Tensor]:
    """Return the bytes of a tile's codes, scales and offsets."""
    vectors = (vector.contiguous().view(torch.uint8) for vector in (channels.scale, channels.offset))
    return [pack_codes(channels.codes.transpose(-1, -2), fields), *vectors]


def _restored(
    record: torch.Tensor, fields: tuple[Field, ...], scale_at: int, offset_at: int, tokens: int
) -> torch.Tensor:
    """Return values by codes, scales and offsets of channels, [..., tokens, channels], float32."""
    codes = unpack_codes(record, fields, tokens)
    scale, offset = (
        record[..., at : at + 2 * codes.shape[-1]].contiguous().view(torch.float16) for at in (scale_at, offset_at)
    )
    return QuantisedRows(codes.transpose(-1, -2), scale, offset).restore().transpose(-1, -2)
