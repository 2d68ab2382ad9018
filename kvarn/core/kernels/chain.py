"""Let a kernel be launched while the one before it still runs (programmatic dependent launch)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(CHAINED: tl.constexpr):
    """Let the next kernel be launched, then wait until the one before is complete and its writes are visible.

    Every program calls it before it touches memory. Since every program of every chained kernel waits, a kernel that is
    past its wait knows all earlier ones to be complete, not the previous alone.
    """
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
