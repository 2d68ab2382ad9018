"""Merge what the programs of attention left of each row, rotate back and cast."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from kvarn.core.append import device_signs
from kvarn.core.cache import CacheConfig, LayerCache
from kvarn.core.explicit import DECODE_COLUMNS
from kvarn.core.launch import Constants, chained, has_lop3, launch
from kvarn.core.step import Step
from kvarn.core.work import units_per_share

# From so many parts of a task on they are taken many at a time: this many.
_MANY_PARTS, _AT_A_TIME = 16, 64
# Many more of rows of which a warp's threads hold four neighbours each: explicit layouts, and this many warps.
EXPLICIT_PARTS, _NARROWEST, _EXPLICIT_WARPS = 128, 128, 8


@dataclass(frozen=True, slots=True)
class CombineShape:
    """How the kernel that merges is launched.

    Args:
        columns: query columns of a program.
        parts: partial results that it takes at a time.
        warps: of a program.
    """

    columns: int
    parts: int
    warps: int


_BY_MATRIX = CombineShape(16, 2, 4)
# One warp has no barriers: merging 64 rows of 8 heads took 15 us less than with four. Of few columns it takes more
# parts at a time: six programs a multiprocessor leave more than wide ones do.
_FEW, _FEW_NARROW = CombineShape(2, 4, 1), CombineShape(2, 8, 1)
# Rows as wide as latents fill the registers of four warps.
_WIDE, _FEW_WIDE = 512, CombineShape(1, 8, 4)


def combine_shape(programs: int, tasks: int, columns: int, config: CacheConfig[Any]) -> CombineShape:
    """Return the shape for so many programs of attention a kv head, and tasks of so many columns that they share."""
    layout = config.layout
    if layout.padded_dim != layout.head_dim:
        return _BY_MATRIX
    many = 4 * _MANY_PARTS if layout.head_dim >= _WIDE else _MANY_PARTS
    # batch-invariant: the same order of summing whatever else is in the batch
    if programs // tasks < many or config.batch_invariant:
        narrow = columns <= DECODE_COLUMNS and not config.batch_invariant
        return _FEW_WIDE if layout.head_dim >= _WIDE else _FEW_NARROW if narrow else _FEW
    return CombineShape(1, _AT_A_TIME, max(4, layout.head_dim // 32))


def merged_sooner(programs: int, tasks: int, config: CacheConfig[Any]) -> int:
    """Return so many programs of attention, or a few less if merging what they leave of a task takes a turn less."""
    if config.batch_invariant:  # one for every share
        return programs
    turns = programs // (_AT_A_TIME * tasks)
    fewer = turns * _AT_A_TIME * tasks
    return fewer if programs - fewer <= programs // 16 else programs


def combine(
    partial: torch.Tensor, partial_lse: torch.Tensor, layer: LayerCache[Any], step: Step, out: torch.Tensor,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Merge the partial results of every task, rotate back and cast to the model dtype.

    Args:
        partial: [programs + tasks, kv_heads, columns, head_dim], float32: what program p made of task t stands in row
            p + t. Parts that saw nothing may hold anything.
        partial_lse: [programs + tasks, kv_heads, columns], float32, base 2; -inf for a part that saw nothing.
        layer: the layer's cache.
        step: the forward pass.
        out: [tokens, q_heads, head_dim], contiguous; written.
        sink_logits: [q_heads], any float dtype, contiguous: one more part of every row, with value zero.

    Returns:
        Natural log-sum-exp [tokens, q_heads], float32.
    """
    tokens, q_heads, head_dim = out.shape
    kv_heads, columns = partial_lse.shape[1:]
    tasks = step.task_request.shape[0]
    programs = partial.shape[0] - tasks
    lse = torch.empty(tokens, q_heads, dtype=torch.float32, device=partial.device)
    shape = combine_shape(programs, tasks, columns, layer.config)
    if has_explicit_merging(programs // tasks, layer.config, partial.device):
        launch(
            _explicit_kernel(), (tasks, kv_heads, columns),
            partial, partial_lse, out, lse, step.task_request, step.task_row, step.work_end, step.query_start,
            sink_logits, tasks, programs, q_heads,
            constants=_explicit_constants(
                layer.config, q_heads // kv_heads, step.rows_per_task, columns, partial.device
            ),
        )  # fmt: skip
        return lse
    from kvarn.core.kernels.combine import combine_kernel

    launch(
        combine_kernel, (tasks, kv_heads, -(-columns // shape.columns)),
        partial, partial_lse, device_signs(head_dim, torch.float16, partial.device, True), out, lse,
        step.task_request, step.task_row, step.work_end, step.query_start, sink_logits, tasks, programs, q_heads,
        constants=_constants(layer.config, shape, q_heads // kv_heads, step.rows_per_task, columns, partial.device),
    )  # fmt: skip
    return lse


def has_explicit_merging(parts: int, config: CacheConfig[Any], device: torch.device) -> bool:
    """Return whether the kernel with explicit layouts (`kernels.gluon.combine`) merges so many parts of a task.

    One or two kv heads leave so many. It needs an NVIDIA GPU.
    """
    head_dim = config.layout.head_dim
    whole = _NARROWEST <= head_dim < _WIDE and head_dim & (head_dim - 1) == 0
    return has_lop3(device) and whole and parts >= EXPLICIT_PARTS and not config.batch_invariant


def _explicit_kernel() -> Any:
    from kvarn.core.kernels.gluon.combine import combine_parts_kernel

    return combine_parts_kernel


@functools.lru_cache(maxsize=256)
def _explicit_constants(
    config: CacheConfig[Any], group: int, rows_per_task: int, columns: int, device: torch.device
) -> Constants:
    head_dim = config.layout.head_dim
    return Constants({
        "GROUP": group, "ROWS": rows_per_task, "COLUMNS": columns, "PARTS": _EXPLICIT_WARPS * 2048 // head_dim,
        # whose it is doesn't matter: only whether tasks are counted in units is asked
        "SHARE": units_per_share(config, rows_in_ring=True), "D": head_dim, "NORM": config.rotation_norm,
        **chained(device), "num_warps": _EXPLICIT_WARPS,
    })  # fmt: skip


@functools.lru_cache(maxsize=256)
def _constants(
    config: CacheConfig[Any], shape: CombineShape, group: int, rows_per_task: int, columns: int, device: torch.device
) -> Constants:
    return Constants({
        "GROUP": group, "ROWS": rows_per_task, "COLUMNS": columns, "BLOCK": shape.columns, "PARTS": shape.parts,
        "SHARE": units_per_share(config, rows_in_ring=True), "D": config.layout.head_dim,
        "DP": config.layout.padded_dim, "NORM": config.rotation_norm, **chained(device), "num_warps": shape.warps,
    })  # fmt: skip
