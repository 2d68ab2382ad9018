"""Restoring cached latents against the reference, in poisoned memory."""

from dataclasses import replace

import pytest
import torch
from latent_cases import make_latent_case
from tolerance import relative_max

from kvarn.core.flash import Spans
from kvarn.core.latent.restore import restore_latents, restore_latents_reference
from kvarn.core.prefill_plan import Segment


def segment_of(begins: list[int], ends: list[int], first: int) -> Segment:
    """The tokens from begin to end of some requests, the first of them `first`."""
    lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
    begin = torch.tensor(begins, dtype=torch.int32)
    key_start = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)
    spans = Spans(key_start, key_start, 0, max(lengths))
    return Segment(first, slice(0), begin, spans, sum(lengths), restored=True, causal=False, opens=True)


@pytest.mark.parametrize(
    ("begins", "ends", "first"),
    [([0], [300], 0), ([128, 0, 0], [300, 40, 130], 0), ([0, 64], [40, 129], 1), ([256, 0], [370, 110], 0)],
    ids=["all", "parts", "later-requests", "with-own-rows"],
)
@pytest.mark.parametrize("settings", [{}, {"rope_bits": 8, "bits": 3, "tiles_per_block": 2, "hits": [256, 0, 64]}])
def test_restored_rows_are_those_of_the_reference(begins, ends, first, settings, device):
    case = make_latent_case([300, 40, 130], [70, 70, 1], outliers=True, **settings)
    segment = segment_of(begins, ends, first)
    want = restore_latents_reference(case.rows, case.layer, case.step, segment)
    moved = case.to(device)
    spans = replace(segment.spans, key_start=segment.spans.key_start.to(device))
    room = torch.full((segment.keys + 3, case.raw.shape[-1]), torch.nan, dtype=case.raw.dtype, device=device)
    segment = replace(segment, begin=segment.begin.to(device), spans=spans)
    got = restore_latents(moved.rows, moved.layer, moved.step, segment, room)
    assert torch.isfinite(want).all()
    assert relative_max(torch.cat(got, dim=-1), want) < 2e-3
    assert torch.isnan(room[segment.keys :]).all()
