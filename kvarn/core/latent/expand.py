"""ExpandedHeads: keys and values of all heads, as a model's up-projection makes them from latents."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvarn.core.cache import CacheConfig
from kvarn.core.flash import FlashAttention, flash_for
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.rows import LatentRows


@dataclass(frozen=True, slots=True)
class ExpandedHeads:
    """Heads to which long chunks attend.

    Args:
        count: heads of a layer on this rank.
        key_width: channels of a key: those that the up-projection makes, then the rope part.
        value_width: channels of a value.
    """

    count: int
    key_width: int
    value_width: int

    def token_numbers(self, layout: LatentLayout) -> int:
        """Return how many numbers a cached token takes at most, restored and expanded: the unit of a workspace."""
        made = self.key_width - layout.rope_dim + self.value_width
        # a raw row, its latent by itself, what is projected, keys, and values as wide as keys
        return layout.row_dim + layout.latent_dim + self.count * (made + 2 * self.key_width)

    def flash(
        self, config: CacheConfig[LatentLayout], like: torch.Tensor, engine: FlashAttention | None
    ) -> FlashAttention | None:
        """Return what attends to these heads, or None if queries are to be absorbed always: `flash_for`.

        Args:
            config: shared numbers of the cache.
            like: a tensor of the model's dtype and device.
            engine: the engine's own flash attention, if it has one that runs here.
        """
        return flash_for(config, like.dtype, like.device, caps_logits=False, engine=engine, head_dim=self.key_width)

    def expand(
        self, rows: LatentRows, project: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make keys and values.

        Args:
            rows: latents [tokens, latent_dim] and rope parts [tokens, rope_dim], model dtype, token strides are free.
            project: the model's up-projection of contiguous latents, to [tokens, heads * (key width without the rope
                part + value width)].

        Returns:
            Keys [tokens, heads, key width], contiguous; values [tokens, heads, value width], token and head strides of
            what was projected.
        """
        nope_width = self.key_width - rows.rope.shape[-1]
        made = project(rows.latent.contiguous()).view(-1, self.count, nope_width + self.value_width)
        # two copies, because concatenation is slow where an operand is expanded
        keys = made.new_empty(*made.shape[:2], self.key_width)
        keys[..., :nope_width] = made[..., :nope_width]
        keys[..., nope_width:] = rows.rope[:, None]
        return keys, made[..., nope_width:]
