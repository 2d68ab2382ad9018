"""Work: what attention reads, counted on the device, so that programs share it out evenly whatever the lengths.

A *unit* is a tile or a block of raw rows; both are about as many bytes. The units of all tasks stand in one row, and
every program takes an equal stretch of it. A stretch may end inside a task and begin inside another: each pair of
program and task leaves one partial result, and `combine` merges those of a task.

To end one task and begin another takes a program about as long as a unit. So each task counts one more than it has, its
last, which reads nothing: programs that go from one task to the next read one unit less than others.

In the batch-invariant mode tasks are counted in *shares* of so many units instead, and every program takes one.
"""

import math
from typing import Any, NamedTuple

import torch

from kvarn.core.cache import CacheConfig, runs_triton
from kvarn.core.launch import launch
from kvarn.core.read_rule import record_end

# Raw rows of a unit.
RAW_BLOCK = 32
# Tasks that a kernel looks at together.
TASK_BLOCK = 1024
_INVARIANT_SHARE = 32
_WHOLE_TASK = 1 << 30


def units_per_share(config: CacheConfig[Any], *, rows_in_ring: bool) -> int:
    """Return how many units count as one.

    Where results may not depend on the batch, decode tasks are split at fixed units and those of chunks, which are
    many, not at all.
    """
    if not config.batch_invariant:
        return 1
    return _INVARIANT_SHARE if rows_in_ring else _WHOLE_TASK


def most_shares(config: CacheConfig[Any], tasks: int, pages: int, *, rows_in_ring: bool) -> int:
    """Return the most that `count_work` can count, for tasks of requests of at most so many pages."""
    raw_units = config.ring_tokens // RAW_BLOCK + 1 if rows_in_ring else pages * config.tile_tokens // RAW_BLOCK
    return tasks * math.ceil((pages + raw_units) / units_per_share(config, rows_in_ring=rows_in_ring))


class Tasks(NamedTuple):
    """The fields of a Step that say what its attention tasks read."""

    task_request: torch.Tensor
    task_row: torch.Tensor
    rows_per_task: int
    query_start: torch.Tensor
    prefix_lens: torch.Tensor
    seq_lens: torch.Tensor
    own_start: torch.Tensor
    rows_in_ring: bool


def count_work(config: CacheConfig[Any], tasks: Tasks) -> torch.Tensor:
    """Return the running sum of all tasks' shares, [tasks], int32; tasks of no request have none. Graph-safe: yes."""
    if not runs_triton(tasks.task_request):
        return count_work_reference(config, tasks)
    from kvarn.core.kernels.work import count_work_kernel

    work_end = torch.empty_like(tasks.task_request)
    launch(
        count_work_kernel, (1,),
        tasks.task_request, tasks.task_row, tasks.query_start, tasks.prefix_lens, tasks.seq_lens, tasks.own_start,
        work_end, tasks.task_request.shape[0], ROWS=tasks.rows_per_task, G=config.tile_tokens,
        TAIL=config.tail_tokens, RAW_BLOCK=RAW_BLOCK, ROWS_IN_RING=tasks.rows_in_ring, CANONICAL=config.canonical,
        BLOCK=TASK_BLOCK, SHARE=units_per_share(config, rows_in_ring=tasks.rows_in_ring),
    )  # fmt: skip
    return work_end


def count_work_reference(config: CacheConfig[Any], tasks: Tasks) -> torch.Tensor:
    """Count in plain torch."""
    request = tasks.task_request.clamp_min(0).long()
    prefix, length, own = tasks.prefix_lens[request], tasks.seq_lens[request], tasks.own_start[request]
    first = prefix + tasks.task_row
    last = torch.minimum(first + tasks.rows_per_task, prefix + tasks.query_start.diff()[request]) - 1
    committed = length if config.canonical else prefix
    tiles = record_end(config, committed, last, own) // config.tile_tokens
    raw_start = record_end(config, committed, first, own)
    ring_end = torch.minimum(length, last + 1) if tasks.rows_in_ring else prefix
    own_rows = last + 1 - torch.maximum(raw_start, ring_end)
    share = units_per_share(config, rows_in_ring=tasks.rows_in_ring)
    shares = -(-(tiles + _blocks(ring_end - raw_start) + _blocks(own_rows)) // share) + int(share == 1)
    return torch.where(tasks.task_request >= 0, shares, 0).cumsum(0).to(torch.int32)


def _blocks(rows: torch.Tensor) -> torch.Tensor:
    return (rows.clamp_min(0) + RAW_BLOCK - 1) // RAW_BLOCK
