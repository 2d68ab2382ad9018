"""One chain of drafts out of a tree: what a corpus of n-grams proposes is a tree, even at breadth 1."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def longest_chains(tokens: NDArray[Any], mask: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Turn every request's tree into a chain of as many tokens: its longest path first, then whatever else there was.

    At breadth 1 suffixes of different lengths still propose tokens of their own, and an engine may pad a tree with
    children of its root. What is verified as a chain must be one, or a draft would attend to drafts that aren't before
    it. What follows the path is a guess like any other: it is accepted only if it is what comes next.

    Args:
        tokens: [requests * n], drafts of every request, the first one certain; parents stand before their children.
        mask: [requests * n * n], nonzero where a token descends from another or is that token.
    """
    n = mask.size // tokens.size
    tree = mask.reshape(-1, n, n) != 0
    path = np.take_along_axis(tree, tree.sum(axis=-1).argmax(axis=-1)[:, None, None], axis=1)[:, 0]
    order = np.argsort(~path, axis=-1, kind="stable")
    chains = np.take_along_axis(tokens.reshape(-1, n), order, axis=-1)
    return chains.reshape(-1), np.tile(np.tri(n, dtype=mask.dtype).reshape(-1), len(chains))
