"""Let a kernel be launched while the one before it still runs (programmatic dependent launch).

Every program of a chained kernel calls both functions, so a kernel that is past its wait knows all earlier ones to be
complete, not the previous alone. The first kernel of an operation waits before it allows the next: so whatever ran
before the operation is complete when its later kernels begin, and they may read that before they wait, from the
second-level cache: that the first level holds nothing older is only certain after the wait.
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
