"""The softmax of two warp groups that take turns: each has the logits of half a tile's tokens.

Weights and the running maximum go from one group to the other and back. With the weights of both halves each adds up
the output of half the channels, the first half's tokens first. Memory is (own, other, maxima, bars): the group's half
of a tile, the other's, the maxima that weights follow, [2, columns], and barriers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kvarn.core.kernels.gluon.group_tiles import COLUMNS, HALF, blocks_together, groups_mma
from kvarn.core.kernels.gluon.layouts import wait_for_warps
from kvarn.core.kernels.task import WEIGHT_SHIFT

# Barriers: the weights of a half are there, by half; its tokens were read by the other group, by half; both are here.
_READY, _FREE, _MEET = gl.constexpr(0), gl.constexpr(2), gl.constexpr(4)


@gluon.jit
def allocate_barriers():
    """Return barriers for both groups, before they begin."""
    bars = gl.allocate_shared_memory(gl.int64, [_MEET + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(_MEET + 1):
        mbarrier.init(bars.index(i), count=2 if i == _MEET else 1)
    wait_for_warps()
    return bars


@gluon.jit
def make_visible():
    """Let MMAs see what any thread of this group wrote to shared memory."""
    fence_async_shared()
    wait_for_warps()


@gluon.jit
def meet(bars, met):
    """Let both groups wait for one another. met: how often they did."""
    make_visible()
    mbarrier.arrive(bars.index(_MEET))
    mbarrier.wait(bars.index(_MEET), met & 1)


@gluon.jit
def sums_by_thread(x):
    """Sum x, [columns, tokens], over the tokens that a thread holds, [columns, threads of a row]."""
    return gl.sum(gl.sum(gl.reshape(x, (COLUMNS, 8, 4, 2)), axis=3), axis=1)


@gluon.jit
def _add_weighed(acc, m, m_new, half, WHICH: gl.constexpr):
    """Let the output decay as the maximum grew from m to m_new, and begin to add weight * latent of a half's tokens.

    Unasked whether it grew: the answer of all warps takes as long as 128 multiplications.
    """
    decay = gl.convert_layout(gl.exp2(m - m_new), gl.SliceLayout(1, groups_mma(HALF)), assert_trivial=True)
    values = blocks_together(half, HALF).index(WHICH)
    return warpgroup_mma(half[1], values, acc * decay[:, None], is_async=True)


@gluon.jit
def _decayed(mass, m, m_new):
    of_threads: gl.constexpr = gl.SliceLayout(1, mass.type.layout)
    return mass * gl.convert_layout(gl.exp2(m - m_new), of_threads)[:, None]


@gluon.jit
def _hand_over(x, m, q_scale, memory, WHICH: gl.constexpr):
    """Make weights of logits, let the other group have them and the maximum m that they follow. Return their sums.

    Weights, [columns, tokens], replace rope parts, as many numbers, which only the logits need.
    """
    p = gl.exp2(x * q_scale[:, None] - (m - WEIGHT_SHIFT)[:, None])
    memory[0][1].store(p.to(gl.float16))
    memory[2].index(WHICH).store(m)
    make_visible()
    mbarrier.arrive(memory[3].index(_READY + WHICH))
    return sums_by_thread(p)


@gluon.jit
def begin_turn(m, mass, acc, x, q_scale, memory, fold, WHICH: gl.constexpr):
    """Fold a group's logits into the running softmax, and begin to add the first half's tokens to its output.

    Args:
        m, mass, acc: running maximum, sums by thread and output, of which no MMA runs.
        x: logits, [columns, tokens], to be multiplied by q_scale.
        memory: as of the module.
        fold: how many halves of each group were folded before.
        WHICH: the group, 0 or 1.

    Returns:
        The maximum that the first half's weights follow, the newest one, sums, and the output, of which MMAs run.
    """
    largest = gl.max(x, axis=1) * q_scale
    if WHICH == 0:
        m_first = gl.maximum(m, largest)
        m_new = m_first
        mass = _decayed(mass, m, m_new) + _hand_over(x, m_new, q_scale, memory, WHICH)
        acc = _add_weighed(acc, m, m_first, memory[0], WHICH)
    else:
        mbarrier.wait(memory[3].index(_READY), fold & 1)
        m_first = memory[2].index(0).load(m.type.layout)
        acc = _add_weighed(acc, m, m_first, memory[1], WHICH)
        m_new = gl.maximum(m_first, largest)
        mass = _decayed(mass, m, m_new) + _hand_over(x, m_new, q_scale, memory, WHICH)
    return m_first, m_new, mass, acc


@gluon.jit
def end_turn(m_first, m, mass, acc, memory, fold, WHICH: gl.constexpr):
    """Begin to add the second half's tokens once the first half's are in the output, whose memory is free then.

    Return the newest maximum, sums, and the output, of which MMAs run.
    """
    acc = warpgroup_mma_wait(0, deps=[acc])
    if WHICH == 0:
        mbarrier.wait(memory[3].index(_READY + 1), fold & 1)
        m_new = memory[2].index(1).load(m.type.layout)
        mass = _decayed(mass, m, m_new)
        acc = _add_weighed(acc, m, m_new, memory[1], WHICH)
    else:
        wait_for_warps()
        mbarrier.arrive(memory[3].index(_FREE))
        m_new = m
        acc = _add_weighed(acc, m_first, m, memory[0], WHICH)
    return m_new, mass, acc


@gluon.jit
def wait_for_room(bars, fold, WHICH: gl.constexpr):
    """Wait until the other group has read this one's half. This one's MMAs have read it, and its warps wait, too."""
    wait_for_warps()
    mbarrier.wait(bars.index(_FREE + WHICH), fold & 1)


@gluon.jit
def let_second_go_on(bars, WHICH: gl.constexpr):
    """Let the second group replace its half, which the first one has read, all of its warps."""
    if WHICH == 0:
        mbarrier.arrive(bars.index(_FREE + 1))


@gluon.jit
def take_turn(m, mass, acc, x, q_scale, memory, fold, WHICH: gl.constexpr):
    """Fold a group's logits into the running softmax and both halves into its output, and nothing beside it."""
    m_first, m, mass, acc = begin_turn(m, mass, acc, x, q_scale, memory, fold, WHICH)
    m, mass, acc = end_turn(m_first, m, mass, acc, memory, fold, WHICH)
    acc = warpgroup_mma_wait(0, deps=[acc])
    wait_for_warps()
    let_second_go_on(memory[3], WHICH)
    wait_for_room(memory[3], fold, WHICH)
    return m, mass, acc
