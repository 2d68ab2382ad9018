"""Which requests of a step are long chunks, and in which pieces their cached context is restored. On the host.

A long chunk attends to its own rows as they come, and to its cached context, piece by piece, in rows that are restored
to the model dtype in a workspace of fixed size: so its memory doesn't grow with the context.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from kvarn.core.cache import CacheConfig
from kvarn.core.flash import FlashAttention, Spans

# A chunk of more rows is long. Kernels over tiles unpack them once for every few rows, restoring once for all.
LONG_ROWS = 64
_WORKSPACE_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class OwnRows:
    """Long chunks that stand next to each other in a step.

    Args:
        tokens: their rows of the step.
        spans: where each one's queries are, and its keys, which are the same rows.
    """

    tokens: slice
    spans: Spans


@dataclass(frozen=True, slots=True)
class Segment:
    """Cached tokens, of requests that stand next to each other, that are restored together.

    Args:
        first: the first of these requests.
        tokens: their rows of the step.
        begin: [requests], int32, on the device: first position that is restored; a multiple of a tile.
        spans: where each one's queries and restored keys are.
        keys: tokens restored.
    """

    first: int
    tokens: slice
    begin: torch.Tensor
    spans: Spans
    keys: int


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """How the long chunks of a step attend.

    Args:
        flash: what attends.
        own: their own rows.
        segments: their cached context.
        short_tokens: rows of the step that are in no long chunk.
        short_requests: requests that have these.
        long_last: whether they come first.
        most_short: a request of more rows is a long chunk.
    """

    flash: FlashAttention
    own: list[OwnRows]
    segments: list[Segment]
    short_tokens: int
    short_requests: int
    long_last: bool
    most_short: int


def workspace_tokens(config: CacheConfig[Any], dtype: torch.dtype, token_numbers: int | None = None) -> int:
    """Return how many tokens are restored at a time: whole tiles, at least one.

    Args:
        config: shared numbers of the cache.
        dtype: of the model.
        token_numbers: what a restored token takes, if it is not a raw row.
    """
    rows, width = config.layout.raw_shape
    row = (token_numbers or rows * config.kv_heads * width) * dtype.itemsize
    return max(1, _WORKSPACE_BYTES // (row * config.tile_tokens)) * config.tile_tokens


def plan_prefill(
    config: CacheConfig[Any],
    flash: FlashAttention | None,
    dtype: torch.dtype,
    prefix_lens: list[int],
    query_lens: list[int],
    device: torch.device,
    token_numbers: int | None = None,
    *,
    together: bool = False,
) -> PrefillPlan | None:
    """Plan a step's long chunks; None if it has none, or nothing that attends them.

    Args:
        config: shared numbers of the cache.
        flash: what attends, `flash_for`.
        dtype: of the model.
        prefix_lens: tokens of each request before the step; right for long chunks, any number for others.
        query_lens: rows of each request in the step.
        device: where the step runs.
        token_numbers: as for `workspace_tokens`.
        together: the engine attends to all requests of a step in one way. So all are planned like long chunks, or none.
    """
    if flash is None or (together and not _worth_restoring(prefix_lens, query_lens)):
        return None
    most_short = 0 if together else LONG_ROWS
    longs = [i for i, rows in enumerate(query_lens) if rows > most_short]
    if not longs:
        return None
    starts = _running_sum(query_lens)
    numbers = _Numbers(device)
    own = [
        (group, numbers.spans([query_lens[i] for i in group], [query_lens[i] for i in group]))
        for group in _neighbours(longs)
    ]
    cut = [
        (piece, numbers.ints([begin for _, begin, _ in piece]), numbers.spans(
            [query_lens[i] for i, _, _ in piece], [end - begin for _, begin, end in piece]))
        for piece in _pieces(longs, prefix_lens, workspace_tokens(config, dtype, token_numbers), config.tile_tokens)
    ]  # fmt: skip
    numbers.send()
    long_tokens = sum(query_lens[i] for i in longs)
    return PrefillPlan(
        flash=flash,
        own=[OwnRows(_rows(starts, group), numbers.found(spans)) for group, spans in own],
        segments=[
            Segment(
                piece[0][0],
                _rows(starts, [i for i, _, _ in piece]),
                numbers.tensor(begin),
                numbers.found(spans),
                sum(end - begin for _, begin, end in piece),
            )
            for piece, begin, spans in cut
        ],
        short_tokens=starts[-1] - long_tokens,
        short_requests=len(query_lens) - len(longs),
        long_last=longs[0] + len(longs) == len(query_lens),
        most_short=most_short,
    )


def _worth_restoring(prefix_lens: list[int], query_lens: list[int]) -> bool:
    """Tell whether more rows attend to a token of the step's requests, on average, than are still a short chunk."""
    tokens = [before + new for before, new in zip(prefix_lens, query_lens, strict=True)]
    return sum(n * new for n, new in zip(tokens, query_lens, strict=True)) > LONG_ROWS * sum(tokens)


def _neighbours(requests: list[int]) -> list[list[int]]:
    """Group requests that follow each other without a gap."""
    groups: list[list[int]] = []
    for request in requests:
        if groups and groups[-1][-1] == request - 1:
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


def _pieces(longs: list[int], prefix_lens: list[int], room: int, tile: int) -> list[list[tuple[int, int, int]]]:
    """Cut the cached tokens of long chunks into pieces of at most `room`: (request, begin, end), begin at a tile."""
    pieces: list[list[tuple[int, int, int]]] = []
    left = 0
    for request in longs:
        begin = 0
        while begin < prefix_lens[request]:
            if left < tile or not pieces or pieces[-1][-1][0] < request - 1:
                pieces.append([])
                left = room
            end = min(prefix_lens[request], begin + left // tile * tile)
            pieces[-1].append((request, begin, end))
            left -= end - begin
            begin = end
    return pieces


def _running_sum(counts: list[int]) -> list[int]:
    return list(itertools.accumulate(counts, initial=0))


def _rows(starts: list[int], requests: list[int]) -> slice:
    return slice(starts[requests[0]], starts[requests[-1] + 1])


class _Numbers:
    """Small vectors that reach the device in one copy. They are told apart by where they start and end in it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: list[int] = []
        self._sent = torch.empty(0, dtype=torch.int32)

    def ints(self, values: list[int]) -> tuple[int, int]:
        """Note a vector. It starts at a multiple of 16 bytes, as kernels are compiled for."""
        self._values += [0] * (-len(self._values) % 4)
        self._values += values
        return len(self._values) - len(values), len(self._values)

    def spans(self, queries: list[int], keys: list[int]) -> tuple[tuple[int, int], tuple[int, int], int, int]:
        """Note the vectors of a Spans, from how many queries and keys each request has."""
        return self.ints(_running_sum(queries)), self.ints(_running_sum(keys)), max(queries), max(keys)

    def send(self) -> None:
        """Copy all to the device, without waiting."""
        host = torch.tensor(self._values, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        self._sent = host.to(self._device, non_blocking=True)

    def tensor(self, place: tuple[int, int]) -> torch.Tensor:
        """Return a vector that was noted."""
        return self._sent[place[0] : place[1]]

    def found(self, noted: tuple[tuple[int, int], tuple[int, int], int, int]) -> Spans:
        """Return a Spans that was noted."""
        query_start, key_start, most_queries, most_keys = noted
        return Spans(self.tensor(query_start), self.tensor(key_start), most_queries, most_keys)
