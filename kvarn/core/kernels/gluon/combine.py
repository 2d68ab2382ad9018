"""Merge many partial results of every task with layouts chosen by hand: what `kernels.combine` computes.

A program merges one query column. Its warps take parts by turns and meet once, after the last; then each rotates the
row back by itself, by moves between the threads of a warp.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvarn.core.kernels.chain import allow_next, wait_for_previous
from kvarn.core.kernels.task import LN2, LOG2E, NEVER
from kvarn.core.kernels.work import merging_of_task


@gluon.constexpr_function
def _parts_layout(parts, width, warps):
    """Return the layout of parts, [warps, parts of a warp, width]: a part's neighbours along a warp."""
    return gl.BlockedLayout([1, parts // warps, 4], [1, 1, 32], [warps, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _bits(width):
    return width.bit_length() - 1


@gluon.constexpr_function
def _partner_asm(bit):
    """Return the PTX that gets what the thread holds whose channels differ in a bit, of bits 2 to 6."""
    return f"shfl.sync.bfly.b32 $0, $1, {1 << (bit - 2)}, 31, 0xFFFFFFFF;"


@gluon.jit
def _stage_of_thread(x, BIT: gl.constexpr):
    """Add and subtract channels that differ in a bit and that one thread holds."""
    D: gl.constexpr = x.shape[0]
    pairs = gl.permute(gl.reshape(x, (D // (2 << BIT), 2, 1 << BIT)), (0, 2, 1))
    low, high = gl.split(pairs)
    new = gl.reshape(gl.permute(gl.join(low + high, low - high), (0, 2, 1)), (D,))
    return gl.convert_layout(new, x.type.layout, assert_trivial=True)


@gluon.jit
def _stage_of_warp(x, BIT: gl.constexpr):
    """Add and subtract channels that differ in a bit and that two threads of a warp hold."""
    other = gl.inline_asm_elementwise(_partner_asm(BIT), "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)
    upper = (gl.arange(0, x.shape[0], layout=x.type.layout) >> BIT) % 2 == 1
    return other + gl.where(upper, -x, x)


@gluon.jit
def _rotated_back(x):
    """Multiply a row, [D], by Sylvester's matrix. A warp's threads hold 4 neighbours each, and any bits beyond."""
    for bit in gl.static_range(_bits(x.shape[0])):
        if bit < 2 or bit >= 7:
            x = _stage_of_thread(x, bit)
        else:
            x = _stage_of_warp(x, bit)
    return x


@gluon.jit(do_not_specialize=["tasks", "programs"])
def combine_parts_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, task_request_ptr, task_row_ptr, work_end_ptr, query_start_ptr,
    sink_logits_ptr, tasks, programs, q_heads,
    GROUP: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, PARTS: gl.constexpr, SHARE: gl.constexpr,
    D: gl.constexpr, NORM: gl.constexpr, CHAINED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program merges one column of one task, PARTS parts at a time. Grid: (tasks, kv_heads, columns).

    As `kernels.combine.combine_kernel`.
    """
    allow_next(CHAINED)
    task = gl.program_id(0)
    head = gl.program_id(1)
    column = gl.program_id(2)
    kv_heads = gl.num_programs(1)
    begin, end, first_program, last_program, row, row_ok = merging_of_task(
        task, head, column, task_request_ptr, task_row_ptr, work_end_ptr, query_start_ptr, tasks, programs, q_heads,
        GROUP, ROWS, SHARE,
    )  # fmt: skip
    EACH: gl.constexpr = PARTS // num_warps
    layout: gl.constexpr = _parts_layout(PARTS, D, num_warps)
    of_parts: gl.constexpr = gl.SliceLayout(2, layout)
    warp = gl.arange(0, num_warps, layout=gl.SliceLayout(1, of_parts))
    turn = gl.arange(0, EACH, layout=gl.SliceLayout(0, of_parts))
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    m = gl.full((num_warps,), NEVER, gl.float32, gl.SliceLayout(1, of_parts))
    total = gl.zeros((num_warps,), gl.float32, gl.SliceLayout(1, of_parts))
    acc = gl.zeros((num_warps, D), gl.float32, gl.SliceLayout(1, layout))
    wait_for_previous(CHAINED)
    if (begin < end) & row_ok:
        for start in range(first_program, last_program + 1, PARTS):
            program = start + turn[None, :] * num_warps + warp[:, None]
            at = ((program + task).to(gl.int64) * kv_heads + head) * COLUMNS + column
            ok = program <= last_program
            lse = gl.load(partial_lse_ptr + at, mask=ok, other=float("-inf"))
            ptrs = partial_ptr + at[:, :, None] * D + channel[None, None, :]
            part = gl.load(ptrs, mask=ok[:, :, None], other=0.0)
            m_new = gl.maximum(m, gl.max(lse, axis=1))
            weight = gl.exp2(lse - m_new[:, None])
            # what a part that saw nothing left in memory may be NaN
            part = gl.where((weight > 0)[:, :, None], part * weight[:, :, None], 0.0)
            decay = gl.exp2(m - m_new)
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None] + gl.sum(part, axis=1)
            total = total * decay + gl.sum(weight, axis=1)
            m = m_new
        largest = gl.max(m, axis=0)
        if sink_logits_ptr is not None:
            sink = gl.load(sink_logits_ptr + head * GROUP + column % GROUP).to(gl.float32) * LOG2E
            largest = gl.maximum(largest, sink)
        decay = gl.exp2(m - largest)
        merged = gl.sum(total * decay, axis=0)
        if sink_logits_ptr is not None:
            merged += gl.exp2(sink - largest)
        out = gl.sum(acc * gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None], axis=0)
        out = _rotated_back(out / gl.maximum(merged, 1e-37))
        at = gl.arange(0, D, layout=out.type.layout)
        gl.store(out_ptr + row * D + at, (out * NORM).to(out_ptr.dtype.element_ty))
        nothing = float("-inf")
        gl.store(lse_ptr + row, gl.where(merged > 0, (largest + gl.log2(gl.maximum(merged, 1e-37))) * LN2, nothing))
