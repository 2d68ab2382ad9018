"""core.block_steps: which batches are decode or verify steps, padding of graphs included."""

import pytest
import torch

from kvarn.core.block_steps import equal_rows


@pytest.mark.parametrize(
    ("starts", "tokens", "most", "rows"),
    [
        ([0, 1, 2, 3], 3, 4, 1),
        ([0, 1, 1, 1], 3, 1, 1),
        ([0, 3, 6], 6, 4, 3),
        ([0, 3, 6, 6], 9, 4, 3),
        ([0, 5, 10], 10, 4, 0),
        ([0, 3, 5], 5, 4, 0),
        ([0, 3, 5, 6], 9, 4, 0),
        ([0, 2, 5, 6], 9, 4, 0),
        ([0, 3, 6, 6], 6, 4, 0),
    ],
    ids=[
        *("decode", "padded decode", "verify", "padded verify", "more than is verified", "fewer in the last"),
        *("fewer, padded", "as many in all", "not a graph"),
    ],
)
def test_steps_of_equal_rows_are_told_from_others(starts, tokens, most, rows):
    query_start = torch.tensor(starts, dtype=torch.int32)
    assert equal_rows(query_start, int(query_start.diff().max()), tokens, most) == rows
