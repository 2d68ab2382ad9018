"""Stand-in for the one CuTe-DSL module that SGLang's dense models import but never call here.

Python imports `sitecustomize` at every start, spawned workers included, so this folder goes first on
PYTHONPATH. The real module needs nvidia-cutlass-dsl, which is too large to carry.
"""

import enum
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

NAME = "sglang.kernels.ops.gemm.cutedsl_dual_gemm"


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(NAME, self) if fullname == NAME else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        vars(module).update(
            DualGemmQuantMode=enum.Enum("DualGemmQuantMode", {"UNQUANT": 0, "FP8": 1, "W8A8": 2}),
            MAX_DUAL_GEMM_DECODE_TOKENS=0,
            can_use_dual_gemm=lambda *args, **kwargs: False,
        )
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.insert(0, _StandIn())
