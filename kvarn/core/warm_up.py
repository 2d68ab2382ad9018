"""Warm-up: compile every kernel that a server's steps launch, before it serves."""

from collections.abc import Callable
from typing import Any

import torch

from kvarn.core.attention import attention
from kvarn.core.cache import LayerCache, runs_triton
from kvarn.core.chunk_step import chunk_step, chunk_task_shape
from kvarn.core.explicit import VERIFY_COLUMNS, widest_columns
from kvarn.core.flash import FlashAttention
from kvarn.core.launch import warmed_up
from kvarn.core.prefill_plan import LONG_ROWS, plan_prefill
from kvarn.core.step import Step, task_shape, verify_step
from kvarn.core.tail import TailState

# Attention has variants for two kinds of few tasks, by kv heads, for up to 32, for up to 128, and for more; merging has
# one for very many parts of a task, for many and for few.
_TASKS = (1, 4, 8, 32, 33, 129)
# Rotation has one for more than 512 tokens.
_LONG_CHUNK = 520
# Pieces of cached context before a chunk's own rows: merging has a variant for up to two, and one for more.
_PIECES = (2, 3)


def warm_up(
    layer: LayerCache, q_heads: int, flash: FlashAttention | None, sink_logits: torch.Tensor | None = None
) -> None:
    """Run steps of every kind that has kernels of its own, as `warm_up_steps` says.

    Args:
        layer: any of the model's layers, in the memory that the engine gave it.
        q_heads: query heads of a layer on this rank.
        flash: what attends long chunks, if anything does.
        sink_logits: [q_heads], learned logits of the sinks of some layer, if layers have them.
    """
    config = layer.config

    def run(step: Step, tokens: int) -> None:
        q, k, v = (
            torch.zeros(tokens, n, config.layout.head_dim, dtype=layer.tails.dtype, device=layer.tails.device)
            for n in (q_heads, config.kv_heads, config.kv_heads)
        )
        attention(q, k, v, layer, step, scale=1.0, sink_logits=sink_logits)

    warm_up_steps(layer, q_heads // config.kv_heads, flash, run)


def warm_up_steps(
    layer: LayerCache[Any],
    group: int,
    flash: FlashAttention | None,
    run: Callable[[Step, int], None],
    widest: int | None = None,
    token_numbers: int | None = None,
) -> None:
    """Run decode and verify steps, chunks and long chunks of every kind that has kernels of its own.

    They write to block 0 and to ring 0 of the layer, which are the engine's for padding or not in use yet, and nowhere
    else. For the host, outside of graphs; waits for the device. What is compiled afterwards is told in the log.

    Args:
        layer: any of the model's layers, in the memory that the engine gave it.
        group: query heads that read a record together.
        flash: what attends long chunks, if anything does.
        run: serves a step of so many rows.
        widest: as for `verify_step`.
        token_numbers: as for `plan_prefill`.
    """
    if not runs_triton(layer.records):
        return
    config, device = layer.config, layer.records.device
    chunks_widest, widest = widest or VERIFY_COLUMNS, widest or widest_columns(config.layout, device)

    def run_chunk(flash: FlashAttention | None, prefix: int, tokens: int, room: int | None = None) -> None:
        plan = plan_prefill(config, flash, layer.tails.dtype, [prefix], [tokens], device, token_numbers, room=room)
        table = torch.zeros(1, -(-(prefix + tokens) // config.tile_tokens), dtype=torch.int32, device=device)
        ends = _ints(device, 1, prefix), _ints(device, 1, prefix + tokens)
        row = _ints(device, 1, 0)
        for tags in (torch.zeros(1, 2, dtype=torch.int64, device=device), None):
            step, _ = chunk_step(_scratch_state(layer), row, *ends, tags, table, group, tokens, plan, chunks_widest)
        run(step, tokens)

    # of the numbers of rows that tasks of one shape serve, the least, of one task a request, and the largest
    numbers = range(1, config.draft_tokens + 2)
    largest = {task_shape(config, group, each, widest): each for each in numbers}
    least = {task_shape(config, group, each, widest): each for each in reversed(numbers)}
    for tasks in _TASKS:
        rows, ones, table = _ints(device, tasks, 0), _ints(device, tasks, 1), _ints(device, tasks, 0)[:, None]
        for each in sorted({1, *least.values(), *largest.values()}):
            run(verify_step(_scratch_state(layer), rows, ones, table, group, each, widest), tasks * each)
        run_chunk(None, 0, tasks * chunk_task_shape(config, group, chunks_widest)[0])
    tile = config.tile_tokens
    for prefix in (0, tile):
        run_chunk(flash, prefix, _LONG_CHUNK)
    for pieces in _PIECES:
        run_chunk(flash, pieces * tile, LONG_ROWS + 1, room=tile)
    if layer.records.is_cuda:
        torch.cuda.synchronize(device)
    warmed_up()


def _scratch_state(layer: LayerCache[Any]) -> TailState:
    """Return a state of one ring and the padding block, so that a step leaves the server's alone."""
    return TailState(layer.config, rows=1, blocks=1, sink_slots=1, device=layer.records.device)


def _ints(device: torch.device, count: int, value: int) -> torch.Tensor:
    return torch.full((count,), value, dtype=torch.int32, device=device)
