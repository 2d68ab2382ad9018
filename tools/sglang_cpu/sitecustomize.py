"""Stand-ins that let stock SGLang start and serve on a machine without a GPU.

Put this folder first on ``PYTHONPATH``: Python imports ``sitecustomize`` at the start of every interpreter,
so the processes that SGLang spawns get the stand-ins too. Set ``SGLANG_USE_CPU_ENGINE=1`` as well.

Two imports stop SGLang 0.5.17 and 0.5.23 beside a CPU build of torch:

* ``sgl_kernel`` is imported unconditionally, but only its CUDA build is published. :class:`KernelStub` makes every
  name in it importable. Those that speculative decoding calls are written in Python (``sglang_cpu_kernels``); any other
  raises as soon as it is called, so no missing kernel can pass unnoticed.
* ``torchvision`` registers Python fake kernels for operators that its C extension defines, and the published
  extension needs CUDA libraries. :class:`OperatorSchemas` defines the two operator schemas in its place.

Nothing is decided, and torch is not imported, when the interpreter starts. Each stand-in looks at the machine only
when its package is first imported, and steps aside if the real thing works: an installed ``sgl_kernel`` is
always found first, and with a usable CUDA device nothing is replaced.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _torch() -> Any:
    """Import torch as late as possible; whoever imports a package that has a stand-in needs torch anyway."""
    import torch

    return torch


def _kernels() -> Any:
    """Import the kernels that are written in Python, which import torch."""
    import sglang_cpu_kernels

    return sglang_cpu_kernels


class KernelModule(types.ModuleType):
    """A module in which every public name exists, and raises when called unless it is written in Python."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        """Return a kernel, or a function that names it; dunder names stay missing, as introspection expects."""
        if name.startswith("__"):
            raise AttributeError(name)
        kernel: Callable[..., object] | None = getattr(_kernels(), name, None)
        if kernel is not None:
            return kernel
        full_name = f"{self.__name__}.{name}"

        def missing(*_args: object, **_kwargs: object) -> object:
            raise NotImplementedError(f"{full_name} needs sgl_kernel and a GPU; this is the CPU stand-in")

        missing.__name__ = name
        return missing


class KernelStub(MetaPathFinder, Loader):
    """Import ``sgl_kernel`` and anything below it as stand-ins. Belongs last in ``sys.meta_path``."""

    def __init__(self) -> None:
        """Start with no operators; torch forgets them when the library object dies, so it is kept here."""
        self._library: Any = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """Claim ``sgl_kernel`` when no other finder had it and no GPU is there to need the real one."""
        if fullname.partition(".")[0] != "sgl_kernel" or _torch().cuda.is_available():
            return None
        if fullname == "sgl_kernel.scalar_type":
            return None  # SGLang then uses its own mock of the scalar types, which works; a stand-in would not
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        """Make the stand-in for one module."""
        return KernelModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Define the operators that come with the package; a stand-in has no code of its own."""
        if self._library is None:
            self._library = _kernels().register_attention()


class OperatorSchemas(MetaPathFinder):
    """Define torchvision's operators just before torchvision is imported, if its C extension cannot do so.

    Belongs first in ``sys.meta_path``; it never claims a module, it only acts in time.
    """

    def __init__(self) -> None:
        """Start with no library; torch forgets the schemas when the library object dies, so it is kept here."""
        self._library: Any = None
        self._done = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> None:
        """Act once on ``import torchvision``, then leave the search to the ordinary finders."""
        if fullname != "torchvision" or self._done:
            return
        self._done = True
        spec = importlib.machinery.PathFinder.find_spec("torchvision")
        if spec is not None and spec.origin is not None:
            self._define_unless_loadable(Path(spec.origin).parent)

    def _define_unless_loadable(self, package: Path) -> None:
        """Load the extension as torchvision itself will; only if that fails, define the schemas in its place."""
        torch = _torch()
        try:
            for extension in package.glob("_C*.so"):
                torch.ops.load_library(extension)
                return
        except OSError:
            pass
        self._library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in TORCHVISION_SCHEMAS:
            self._library.define(schema)


def install() -> None:
    """Put the stand-ins on the import path, once.

    They are known by class name: a tool may load this file a second time, under another module name.
    """
    if not any(type(finder).__name__ == KernelStub.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, OperatorSchemas())
        sys.meta_path.append(KernelStub())


install()
