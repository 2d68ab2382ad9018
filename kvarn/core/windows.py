"""What layers with a sliding window cost: their newest tokens, in the model's dtype. Imports no torch and no engine."""

from __future__ import annotations

from dataclasses import dataclass

# Tokens of a page that most attention kernels take.
PAGES = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class WindowShape:
    """What one rank keeps in layers with a window.

    Args:
        layers: layers with a window.
        tokens: newest tokens that they attend to.
        kv_heads: kv heads of one layer on this rank.
        head_dim: channels of one head, for K and V alike.
        raw_bytes: bytes of one number.
        pages: tokens that a page of a layer may have, where pages live in an engine's blocks.
    """

    layers: int
    tokens: int
    kv_heads: int
    head_dim: int
    raw_bytes: int
    pages: tuple[int, ...] = PAGES

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.raw_bytes

    def bytes_per_request(self, context: int) -> int:
        """Bytes of a request of so many tokens in all layers."""
        return self.layers * min(self.tokens, context) * self.token_bytes

    def blocks_per_request(self, block_bytes: int, tokens: int) -> int:
        """Blocks of a running request, where blocks of the engine hold pages of several layers each.

        Args:
            block_bytes: of a block.
            tokens: of a layer's page. A window that begins within a page keeps all of it.
        """
        layers_per_block = max(1, block_bytes // (tokens * self.token_bytes))
        return -(-self.layers // layers_per_block) * (-(-self.tokens // tokens) + 1)

    def page_tokens(self, block_bytes: int, block_tokens: int) -> int:
        """Return the tokens of a layer's page with which a running request takes the fewest blocks.

        No page is larger than a block, if that can be, because the largest page decides what every block takes.

        Args:
            block_bytes: of a block, which holds records of all layers in tiles.
            block_tokens: tokens of those; a page's divide them, so that prefixes end where pages do.
        """
        whole = [tokens for tokens in self.pages if block_tokens % tokens == 0]
        fitting = [tokens for tokens in whole if tokens * self.token_bytes <= block_bytes]
        return min(
            fitting or whole[:1], key=lambda tokens: self.blocks_per_request(block_bytes, tokens), default=block_tokens
        )
