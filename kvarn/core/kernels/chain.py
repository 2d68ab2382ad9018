"""Let a kernel be launched while the one before it still runs (programmatic dependent launch).

Every program of a chained kernel calls both functions. A kernel that is past its wait knows all earlier ones to be
complete, not the previous alone. Before its wait it may read what describes the step, which kernels wrote that aren't
chained, so that they were complete before any later one began; page tables; and records that the step doesn't seal. It
reads rings, rotated rows and partial results, and writes whatever it does, after its wait.

Attention over dense heads has queries when it begins, if the step fills a tile: then the first kernel waits before it
allows the next, so that attention doesn't wait for what is sealed. Else the first kernel may allow the next at once,
which waits for queries, too: it isn't long. Queries that are read before a wait come from the second-level cache: that
the first level holds nothing older is only certain after it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def allow_next(CHAINED: tl.constexpr):
    """Let the next kernel be launched, as far as there is room beside this one."""
    if CHAINED:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(CHAINED: tl.constexpr):
    """Wait until the kernel before is complete and its writes are visible. Again costs nothing."""
    if CHAINED:
        gdc_wait()


@triton.jit
def allow_next_early(fills_ptr, CHAINED: tl.constexpr):
    """Let the next kernel be launched before this one waits, if the step fills no tile. fills: of a Step."""
    if tl.load(fills_ptr) == 0:
        allow_next(CHAINED)


@triton.jit
def wait_for_queries(fills_ptr, CHAINED: tl.constexpr):
    """Wait where the first kernel may have allowed the next early. fills: of a Step, None for what has waited."""
    if fills_ptr is not None:  # noqa: SIM102 (joined, none would be loaded from)
        if tl.load(fills_ptr) == 0:
            wait_for_previous(CHAINED)
