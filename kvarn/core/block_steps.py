"""From a batch as an engine tells it to Steps, where a request's rings stand in blocks of its own."""

from dataclasses import dataclass

import torch

from kvarn.core.block_pool import BlockPool
from kvarn.core.chunk_step import chunk_step
from kvarn.core.prefill_plan import PrefillPlan
from kvarn.core.step import Step, aligned_ints, verify_step


@dataclass
class BlockBatch:
    """What a step is, told once for all layers.

    Args:
        seq_lens: [requests], int32, tokens after the step; 0 for padding.
        query_start: [requests + 1], int32.
        block_table: [requests, blocks], int32.
        num_tokens: rows of the step that hold tokens, padding of a graph included.
        rows_each: rows of every request in a decode or verify step; 0 in any other.
        plan: of the step's long chunks.
        steps: the step for every column of the rings' blocks, once `block_steps` has described it.
    """

    seq_lens: torch.Tensor
    query_start: torch.Tensor
    block_table: torch.Tensor
    num_tokens: int
    rows_each: int
    plan: PrefillPlan | None = None
    steps: list[Step] | None = None


def block_steps(
    pool: BlockPool, batch: BlockBatch, ring_blocks: torch.Tensor, group: int, widest: int | None = None
) -> list[Step]:
    """Return the description of a step for every column of the rings' blocks. Graph-safe but for chunks.

    Args:
        pool: the caches.
        batch: the step.
        ring_blocks: [requests, columns], int32, the blocks that hold a request's rings.
        group: query heads that read a record together.
        widest: query columns of a program, if not those of kernels over keys and values.
    """
    options = {} if widest is None else {"widest": widest}
    requests, columns = ring_blocks.shape
    rows = aligned_ints(columns, requests, ring_blocks.device).copy_(ring_blocks.t())
    table = batch.block_table
    tiles = pool.config.tiles_per_block
    if tiles > 1:
        table = (table[:, :, None] * tiles + torch.arange(tiles, dtype=torch.int32, device=table.device)).flatten(1)
    if batch.rows_each:
        step = verify_step(pool.state, rows[0], batch.seq_lens, table, group, batch.rows_each, **options)
    else:
        prefix_lens = batch.seq_lens - batch.query_start.diff()
        ends, tokens, plan = batch.seq_lens, batch.num_tokens, batch.plan
        step, _ = chunk_step(
            pool.state, rows[0], prefix_lens, ends, None, table, group, tokens, plan, hits_inside=True, **options
        )
    return [step.with_rings(column) for column in rows]


def equal_rows(query_start: torch.Tensor, rows: int, num_tokens: int, most: int) -> int:
    """Return the rows of every request if all have as many, and no more than a verify step takes; else 0.

    Requests that pad a graph have none here, come last, and get as many.

    Args:
        query_start: [requests + 1], int32, on the host.
        rows: of the request that has most.
        num_tokens: rows of the step, padding of a graph included.
        most: rows of a request that a verify step takes.
    """
    if rows == 1:
        return 1
    requests = query_start.shape[0] - 1
    if rows > most or num_tokens != requests * rows or int(query_start[-1]) % rows:
        return 0
    equal = torch.arange(0, (requests + 1) * rows, rows, dtype=query_start.dtype).clamp_max(query_start[-1])
    return rows if torch.equal(query_start, equal) else 0
