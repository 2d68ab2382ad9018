"""Chunks tile by tile, where a row's bits may not depend on the steps that its request came in.

Attention reads raw rows in blocks. In a decode step these begin with a tile; in a step of chunks, whose own rows aren't
in the ring, a block ends where these begin. So a chunk that begins inside a tile sums in another order than decode
would. In the mode in which that counts, every part of a chunk that lies in one tile is stored, sealed and attended to
as a decode step's rows are.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from kvarn.core.cache import CacheConfig
from kvarn.core.step import Step, StepPart
from kvarn.core.work import Tasks, count_work

# Rows of a part, and units that all of them read: what attention leaves of every row's shares takes memory.
_PART_ROWS = 256
_PART_UNITS = 1 << 18


class _Piece(NamedTuple):
    """What a step adds to one tile of a request, or the turn-th piece of it: positions begin to end, from a row on."""

    tile: int
    turn: int
    request: int
    begin: int
    end: int
    row: int


def tile_by_tile(step: Step, config: CacheConfig[Any]) -> Step:
    """Cut a step of chunks into parts that add to at most one tile of a request, the first tiles first.

    Of several requests they go in step, because one may hit a page that another fills in this step. Without the
    canonical mode, or without batch invariance, the step is returned as it is.

    Args:
        step: of chunks.
        config: shared numbers of the cache.

    Determinism: a row's bits follow from its request's rows alone. Graph-safe: no, waits for the device.
    """
    if not (config.canonical and config.batch_invariant):
        return step
    parts = []
    for (tile, _), pieces in itertools.groupby(sorted(_pieces(step, config.tile_tokens)), key=lambda piece: piece[:2]):
        few: list[_Piece] = []
        for piece in pieces:
            if few and sum(other.end - other.begin for other in few) + piece.end - piece.begin > _most_rows(tile):
                parts.append(_part(step, few, config))
                few = []
            few.append(piece)
        parts.append(_part(step, few, config))
    return replace(step, parts=tuple(parts))


def attend_by_parts(
    step: Step, q: torch.Tensor, out: torch.Tensor | None, attend: Callable[[torch.Tensor, Step], torch.Tensor]
) -> torch.Tensor:
    """Attend a step's parts one after the other.

    Args:
        step: with parts.
        q: [tokens, ...], of which each part's output has the shape.
        out: the same, contiguous: where to write the result; made here if None.
        attend: returns the output of some of the step's rows, [rows], int64, as a step of their own.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for part in step.parts:
        out[part.tokens] = attend(part.tokens, part.step)
    return out


def _pieces(step: Step, tile_tokens: int) -> Iterator[_Piece]:
    spans = zip(step.prefix_lens.tolist(), step.seq_lens.tolist(), step.query_start.tolist(), strict=False)
    for request, (prefix, length, first) in enumerate(spans):
        for tile in range(prefix // tile_tokens, -(-length // tile_tokens)):
            begin, end = max(prefix, tile * tile_tokens), min(length, (tile + 1) * tile_tokens)
            for turn, at in enumerate(range(begin, end, _most_rows(tile))):
                yield _Piece(tile, turn, request, at, min(end, at + _most_rows(tile)), first + at - prefix)


def _most_rows(tile: int) -> int:
    return max(1, min(_PART_ROWS, _PART_UNITS // (tile + 1)))


def _part(step: Step, pieces: list[_Piece], config: CacheConfig[Any]) -> StepPart:
    device, tile_tokens = step.rows.device, config.tile_tokens

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    counts = [piece.end - piece.begin for piece in pieces]
    inside = [i for count in counts for i in range(count)]
    owner = [i for i, count in enumerate(counts) for _ in range(count)]
    requests = ints([piece.request for piece in pieces]).long()
    fields: dict[str, Any] = {
        "query_start": ints([0, *itertools.accumulate(counts)]),
        "prefix_lens": ints([piece.begin for piece in pieces]),
        "seq_lens": ints([piece.end for piece in pieces]),
        "own_start": step.own_start[requests],
        "task_request": ints(owner),
        "task_row": ints(inside),
    }
    part = Step(
        rows=step.rows[requests],
        block_table=step.block_table[requests, : pieces[0].tile + 1],
        sink_slots=step.sink_slots[requests],
        token_request=fields["task_request"],
        token_position=ints([pieces[i].begin + at for i, at in zip(owner, inside, strict=True)]),
        seal_request=ints(list(range(len(pieces)))),
        seal_tile=ints([piece.tile if piece.end % tile_tokens == 0 else -1 for piece in pieces]),
        work_end=count_work(config, Tasks(rows_per_task=1, rows_in_ring=True, **fields)),
        rows_per_task=1,
        columns=step.columns,
        rows_in_ring=True,
        fills=ints([1]),
        **fields,
    )
    return StepPart(ints([pieces[i].row + at for i, at in zip(owner, inside, strict=True)]).long(), requests, part)
