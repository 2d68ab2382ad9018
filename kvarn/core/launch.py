"""How kernels are launched on a device."""

import functools
from typing import Any

import torch

_FIRST_WITH_DEPENDENT_LAUNCH = (9, 0)


@functools.lru_cache(maxsize=32)
def chained(device: torch.device) -> dict[str, Any]:
    """Return the arguments that let a kernel's launch overlap the end of the kernel before it, where the GPU can.

    For kernels that keep the rules of `kernels.chain`. Saves the time of a launch, about a microsecond, and what a
    kernel does before it waits. Graph-safe: yes.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return {"CHAINED": False}
    able = torch.cuda.get_device_capability(device) >= _FIRST_WITH_DEPENDENT_LAUNCH
    return {"CHAINED": True, "launch_pdl": True} if able else {"CHAINED": False}


def has_lop3(device: torch.device) -> bool:
    """Return whether kernels may use PTX."""
    return device.type == "cuda" and torch.version.hip is None
