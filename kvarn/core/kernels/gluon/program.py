"""A program among others: which part of the work is its, and how much of a multiprocessor."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvarn.core.kernels.gluon.layouts import plain_shared, rows_copy_layout
from kvarn.core.kernels.work import crossing, share_of

# Numbers of 16 bits in a KiB.
_KIB = gl.constexpr(512)


@gluon.jit
def take_room(tasks, KIB: gl.constexpr, warps: gl.constexpr):
    """Make a program take at least so much shared memory, so that no more of its kind fit a multiprocessor.

    A GPU doesn't spread programs evenly over multiprocessors that have room for more, least of all while others still
    run there.
    """
    if KIB > 0:  # noqa: SIM102 (joined, the body would be compiled for none, too)
        if tasks < 0:  # never, which the compiler can't know
            room = gl.allocate_shared_memory(gl.int16, [KIB, 1, _KIB], plain_shared(2))
            room.index(KIB - 1).store(gl.zeros((1, _KIB), gl.int16, rows_copy_layout(2 * _KIB, warps)))


@gluon.jit
def span_of(
    program, programs, work_end_ptr, tasks, BLOCK: gl.constexpr, SHARE: gl.constexpr, warps: gl.constexpr
):  # fmt: skip
    """Return a program's shares, [begin, end), and the first and the last task of which it reads some.

    If BLOCK tasks are all there are, one load tells it all.
    """
    at = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [warps], [0]))
    ends = gl.load(work_end_ptr + at, mask=at < tasks, other=0)
    total = gl.max(ends, axis=0)
    if tasks > BLOCK:
        total = gl.load(work_end_ptr + tasks - 1)
    begin, end = share_of(program, programs, total)
    first = gl.sum(((ends - crossing(SHARE) <= begin) & (at < tasks)).to(gl.int32), axis=0)
    last = gl.sum(((ends <= end - 1) & (at < tasks)).to(gl.int32), axis=0)
    for start in range(BLOCK, tasks, BLOCK):
        ends = gl.load(work_end_ptr + start + at, mask=start + at < tasks, other=2147483647)
        first += gl.sum((ends - crossing(SHARE) <= begin).to(gl.int32), axis=0)
        last += gl.sum((ends <= end - 1).to(gl.int32), axis=0)
    return begin, end, first, last
