"""Triton's interpreter without what it does again and again: the same results and checks in half the time."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def install() -> None:
    """Replace the slow parts, for good."""
    interpreter.InterpretedFunction.__call__ = _call
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of the device; Triton patches its language before every such call, also where it is patched."""
    if any(tl.core.is_builtin(language.load) for language in _languages(function.fn)):
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **kwargs)


@functools.cache
def _languages(function: Callable[..., Any]) -> tuple[Any, ...]:
    """Return the modules that Triton patches for a function."""
    seen = [id(value) for value in function.__globals__.values()]
    return tuple(module for module in (tl, tl.core) if id(module) in seen)


def _check_overflow(_semantic: TritonSemantic, a: Any, b: Any, operation: Callable[..., Any]) -> None:
    """Refuse sums and products that their type can't hold; Triton builds this check of eight operations of its own."""
    kind = a.type.scalar
    if kind.int_bitwidth >= 64:
        return
    exact = _EXACT[operation.__name__](*(x.handle.data.astype(np.int64) for x in (a, b)))
    in_range = kind.get_int_min_value() <= exact.min() and exact.max() <= kind.get_int_max_value()
    assert in_range, f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}"
