"""How kernels are launched on a device."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_FIRST_WITH_DEPENDENT_LAUNCH = (9, 0)
# Triton tells apart whether pointers are multiples of this.
_ALIGNMENT = 16
# By all that the choice of code depends on: the code, and constants by position.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_MOST_KEYS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Constants:
    """Constants of a kernel and options of its compiler. Told apart by identity: to be made once and kept."""

    named: Mapping[str, Any]


_NONE = Constants({})


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, constants: Constants = _NONE, **more: Any) -> None:
    """Launch a Triton kernel, as ``kernel[grid](*args, **constants)`` does, by a shorter way from the second time on.

    At every launch Triton finds anew which code it compiled for such arguments. That takes longer than the launch, and
    steps that no graph has captured wait for it in every layer. Here code is found by no less than Triton's choice
    depends on: constants, types, where tensors are aligned, and the values of numbers that code is specialised for.

    Args:
        kernel: a function made by ``triton.jit`` or Gluon's.
        grid: programs along up to three axes.
        args: tensors, numbers and None, by position.
        constants: its other parameters, all constants, and the compiler's options.
        more: the same, of those that aren't made once.

    Graph-safe: yes.
    """
    specialized = _specialized(kernel)
    if specialized is None:
        kernel[grid](*args, **constants.named, **more)
        return
    # this is a good part of what a launch costs
    kinds = [
        (x if by_value else x >> 31) if type(x) is int
        else (x.dtype if x.data_ptr() % _ALIGNMENT == 0 else (x.dtype,)) if isinstance(x, torch.Tensor)
        else type(x)
        for x, by_value in zip(args, specialized, strict=False)
    ]  # fmt: skip
    key = (kernel, args[0].get_device(), constants, *kinds, *more.items())
    known = _compiled.get(key)
    if known is not None:
        code, rest = known
        code[grid + (1,) * (3 - len(grid))](*args, *rest)
        return
    if len(_compiled) >= _MOST_KEYS:
        _compiled.clear()
    # the parameters that are left are constants, in this order
    named = {**constants.named, **more}
    rest = tuple(named[name] for name in kernel.arg_names[len(args) :])
    _compiled[key] = kernel[grid](*args, **named), rest


@functools.lru_cache(maxsize=64)
def _specialized(kernel: Any) -> list[bool] | None:
    """Return of each parameter whether code may depend on its value.

    None where that is not known: in the interpreter, and on AMD's GPUs, where Triton looks at more.
    """
    if torch.version.hip is not None or not hasattr(kernel, "params"):
        return None
    return [not parameter.do_not_specialize for parameter in kernel.params]


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
