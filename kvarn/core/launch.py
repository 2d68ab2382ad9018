"""How kernels are launched on a device."""

import functools
import itertools
import logging
import operator
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_FIRST_WITH_DEPENDENT_LAUNCH = (9, 0)
# Triton tells apart whether pointers are multiples of this.
_ALIGNMENT = 16
# What doesn't fit here Triton takes as a wider number.
_LEAST, _MOST = -(1 << 31), (1 << 31) - 1
# By all that the choice of code depends on: the code, and constants by position.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_MOST_KEYS = 4096
# A launch that takes longer has waited for the compiler.
_COMPILING_S = 0.1
_warmed_up = threading.Event()
logger = logging.getLogger(__name__)
# By the identity of kernels, which are kept with it.
_parameters: dict[int, "_Parameters | None"] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Constants:
    """Constants of a kernel and options of its compiler. Told apart by identity: to be made once and kept."""

    named: Mapping[str, Any]


_NONE = Constants({})


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, constants: Constants = _NONE, **more: Any) -> None:
    """Launch a Triton kernel, as ``kernel[grid](*args, **constants)`` does, by a shorter way from the second time on.

    At every launch Triton finds anew which code it compiled for such arguments, and asks the driver about every
    pointer. That takes longer than the launch, and steps that no graph has captured wait for it in every layer. Here
    code is found by no less than Triton's choice depends on: constants, types, where tensors are aligned, and the
    values of numbers that code is specialised for. It is launched with addresses, which nobody asks about.

    Args:
        kernel: a function made by ``triton.jit`` or Gluon's.
        grid: programs along up to three axes.
        args: tensors, numbers and None, by position, a tensor first; best those at the beginning that are tensors at
            every launch. A parameter that takes whole numbers takes no others.
        constants: its other parameters, all constants, and the compiler's options.
        more: the same, of those that aren't made once.

    Graph-safe: yes.
    """
    if id(kernel) not in _parameters:
        _parameters[id(kernel)] = _Parameters.of(kernel, args)
    parameters = _parameters[id(kernel)]
    if parameters is None:
        kernel[grid](*args, **constants.named, **more)
        return
    # this is a good part of what a launch costs
    tensors = args[: parameters.tensors]
    try:
        addresses = [x.data_ptr() for x in tensors]
    except AttributeError:  # None, where the kernel was given a tensor before
        _parameters[id(kernel)] = _Parameters.of(kernel, args)
        launch(kernel, grid, *args, constants=constants, **more)
        return
    bits = functools.reduce(operator.or_, addresses) % _ALIGNMENT
    key = (
        parameters, args[0].get_device(), constants, *[x.dtype for x in tensors],
        bits and tuple(x % _ALIGNMENT == 0 for x in addresses), *parameters.kinds(args), *more.items(),
    )  # fmt: skip
    known = _compiled.get(key)
    if known is not None:
        code, rest = known
        code[grid + (1,) * (3 - len(grid))](*addresses, *args[parameters.tensors :], *rest)
        return
    if len(_compiled) >= _MOST_KEYS:
        _compiled.clear()
    # the parameters that are left are constants, in this order
    named = {**constants.named, **more}
    rest = tuple(named[name] for name in kernel.arg_names[len(args) :])
    began = time.perf_counter()
    _compiled[key] = kernel[grid](*args, **named), rest
    _tell_if_late(kernel, args[0], time.perf_counter() - began)


def warmed_up() -> None:
    """Tell from now on, in the log, when a launch waits for the compiler."""
    _warmed_up.set()


def _tell_if_late(kernel: Any, tensor: torch.Tensor, took_s: float) -> None:
    if took_s < _COMPILING_S or not _warmed_up.is_set():
        return
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # a graph, before serving
    told = "KVarN compiled %s while serving, for %.0f ms: warm-up missed a variant. Please report it."
    logger.warning(told, kernel.__name__, took_s * 1e3)


@dataclass(frozen=True, slots=True, eq=False)
class _Parameters:
    """What the choice of code depends on in the arguments of a kernel, told from those of a launch.

    Args:
        kernel: the kernel.
        tensors: so many parameters come first that are tensors.
        by_value: returns the numbers that code may be specialised for.
        by_width: returns other whole numbers, of which Triton looks at the width.
        others: the rest, by position: they may be tensors, fractions or None.
    """

    kernel: Any
    tensors: int
    by_value: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    by_width: Callable[[tuple[Any, ...]], tuple[int, ...]]
    others: tuple[int, ...]

    @classmethod
    def of(cls, kernel: Any, args: tuple[Any, ...]) -> "_Parameters | None":
        """Return what is told by a launch.

        None where that is not known: in the interpreter, and on AMD's GPUs, where Triton looks at more.
        """
        if torch.version.hip is not None or not hasattr(kernel, "params"):
            return None
        tensors = sum(1 for _ in itertools.takewhile(lambda x: isinstance(x, torch.Tensor), args))
        whole = [i for i, x in enumerate(args) if type(x) is int]
        by_value = [i for i in whole if not kernel.params[i].do_not_specialize]
        others = tuple(i for i in range(tensors, len(args)) if i not in whole)
        return cls(kernel, tensors, _picked(by_value), _picked([i for i in whole if i not in by_value]), others)

    def kinds(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what the choice of code depends on beside the tensors that come first."""
        numbers = self.by_width(args)
        narrow = not numbers or (min(numbers) >= _LEAST and max(numbers) <= _MOST)
        others = [_kind(args[i]) for i in self.others]
        return self.by_value(args), narrow or tuple(x >> 31 for x in numbers), *others


def _picked(positions: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return what picks these positions of a tuple."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda args: tuple(args[i] for i in positions)


def _kind(x: object) -> object:
    return (x.dtype, x.data_ptr() % _ALIGNMENT == 0) if isinstance(x, torch.Tensor) else type(x)


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
