"""Which requests of a step are long chunks, and to which keys they attend call by call. On the host.

A long chunk attends to its own rows as they come or, with cached context, to a copy of them behind rows that are
restored to the model dtype, in a workspace of fixed size. What doesn't fit there is attended to before, piece by piece:
so memory doesn't grow with the context.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from kvarn.core.cache import CacheConfig
from kvarn.core.flash import FlashAttention, Spans

# A chunk of more rows is long. Kernels over tiles unpack them once for every few rows, restoring once for all.
LONG_ROWS = 64
_WORKSPACE_BYTES = 144 << 20


@dataclass(frozen=True, slots=True)
class Segment:
    """Keys that long chunks next to each other in a step attend to in one call.

    Args:
        first: the first of these requests.
        tokens: their rows of the step.
        begin: [requests], int32, on the device: position of the first key; a multiple of a tile where it is cached.
        spans: where each one's queries and keys are.
        keys: how many there are.
        restored: keys begin with cached ones. Otherwise they are the chunks' own rows as they come.
        causal: keys end with the chunks' own rows.
        opens: these chunks attended to nothing before.
    """

    first: int
    tokens: slice
    begin: torch.Tensor
    spans: Spans
    keys: int
    restored: bool
    causal: bool
    opens: bool


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """How the long chunks of a step attend.

    Args:
        flash: what attends.
        segments: to which keys, in this order.
        short_tokens: rows of the step that are in no long chunk.
        short_requests: requests that have these.
        long_last: whether they come first.
        most_short: a request of more rows is a long chunk.
        most_restored: the most keys that are restored together, chunks' own ones behind them included.
        on_tiles: all begin at the boundary of a tile.
    """

    flash: FlashAttention
    segments: list[Segment]
    short_tokens: int
    short_requests: int
    long_last: bool
    most_short: int
    most_restored: int
    on_tiles: bool


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
    room: int | None = None,
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
        room: keys that are restored at a time, whole tiles; None for `workspace_tokens`.
    """
    if flash is None or (together and not _worth_restoring(prefix_lens, query_lens)):
        return None
    most_short = 0 if together else LONG_ROWS
    longs = [i for i, rows in enumerate(query_lens) if rows > most_short]
    if not longs:
        return None
    starts = _running_sum(query_lens)
    numbers = _Numbers(device)
    room = room or workspace_tokens(config, dtype, token_numbers)
    groups = [
        (group, numbers.ints([keys.begin for keys in group]), numbers.spans(
            [query_lens[keys.request] for keys in group], [keys.count for keys in group]))
        for group in _together([_cut(i, prefix_lens[i], query_lens[i], room) for i in longs], room)
    ]  # fmt: skip
    numbers.send()
    long_tokens = sum(query_lens[i] for i in longs)
    return PrefillPlan(
        flash=flash,
        segments=[
            _segment(group, starts, numbers.tensor(begin), numbers.found(spans)) for group, begin, spans in groups
        ],
        short_tokens=starts[-1] - long_tokens,
        short_requests=len(query_lens) - len(longs),
        long_last=longs[0] + len(longs) == len(query_lens),
        most_short=most_short,
        most_restored=max((sum(keys.count for keys in group) for group, *_ in groups if group[0].restored), default=0),
        on_tiles=all(prefix_lens[i] % config.tile_tokens == 0 for i in longs),
    )


def _segment(group: "list[_Keys]", starts: list[int], begin: torch.Tensor, spans: Spans) -> Segment:
    first, tokens = group[0], slice(starts[group[0].request], starts[group[-1].request + 1])
    count = sum(keys.count for keys in group)
    return Segment(first.request, tokens, begin, spans, count, first.restored, first.causal, first.opens)


def _worth_restoring(prefix_lens: list[int], query_lens: list[int]) -> bool:
    """Tell whether more rows attend to a token of the step's requests, on average, than are still a short chunk."""
    tokens = [before + new for before, new in zip(prefix_lens, query_lens, strict=True)]
    return sum(n * new for n, new in zip(tokens, query_lens, strict=True)) > LONG_ROWS * sum(tokens)


@dataclass(frozen=True, slots=True)
class _Keys:
    """A segment of one request: so many keys from a position on."""

    request: int
    begin: int
    count: int
    restored: bool
    causal: bool
    opens: bool


def _cut(request: int, prefix: int, rows: int, room: int) -> list[_Keys]:
    """Cut what a long chunk attends to: pieces of the cached tokens, the last with its own rows if they fit."""
    if not prefix:
        return [_Keys(request, 0, rows, restored=False, causal=True, opens=True)]
    pieces = []
    begin = 0
    while begin < prefix and begin + room < prefix + rows:
        count = min(room, prefix - begin)
        pieces.append(_Keys(request, begin, count, restored=True, causal=False, opens=not begin))
        begin += count
    last = _Keys(request, begin, prefix + rows - begin, restored=begin < prefix, causal=True, opens=not begin)
    return [*pieces, last]


def _together(requests: list[list[_Keys]], room: int) -> list[list[_Keys]]:
    """Group the segments of neighbours that have one each, of the same kind; restored ones share a workspace."""
    groups: list[list[_Keys]] = []
    for segments in requests:
        first, before = segments[0], groups[-1] if groups else []
        if (
            before
            and len(segments) == 1
            and before[0].opens
            and before[-1].request == first.request - 1
            and before[0].restored == first.restored
            and (not first.restored or sum(keys.count for keys in before) + first.count <= room)
        ):
            before.append(first)
        else:
            groups += [[keys] for keys in segments]
    return groups


def _running_sum(counts: list[int]) -> list[int]:
    return list(itertools.accumulate(counts, initial=0))


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
