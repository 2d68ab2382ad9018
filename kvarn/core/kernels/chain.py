"""Let a kernel be launched while the one before it still runs (programmatic dependent launch).

Every program of a chained kernel calls both functions. A kernel that is past its wait knows all earlier ones to be
complete, not the previous alone. Before its wait it may read what describes the step, which kernels wrote that aren't
chained, so that they were complete before any later one began; page tables; and records that the step doesn't seal. It
reads rings, rotated rows and partial results, and writes whatever it does, after its wait.

The first kernel over dense heads waits before it allows the next. So the step's queries are complete when later ones
begin, which may read them before their wait, and so needn't wait for tiles that are sealed; from the second-level
cache: that the first level holds nothing older is only certain after the wait.
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
