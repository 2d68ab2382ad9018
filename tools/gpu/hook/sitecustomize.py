"""Stand-ins for modules that SGLang imports for any model but calls for none of those measured here.

Python imports `sitecustomize` at every start, spawned workers included, so this folder goes first on
PYTHONPATH. The real ones need nvidia-cutlass-dsl and sgl-flash-mla, which are too large to carry.
"""

import enum
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Mapping, Sequence

MODULES: Mapping[str, Mapping[str, object]] = {
    "sglang.kernels.ops.gemm.cutedsl_dual_gemm": {
        "DualGemmQuantMode": enum.Enum("DualGemmQuantMode", {"UNQUANT": 0, "FP8": 1, "W8A8": 2}),
        "MAX_DUAL_GEMM_DECODE_TOKENS": 0,
        "can_use_dual_gemm": lambda *args, **kwargs: False,
    },
    "flash_mla": {"__path__": [], "fused_norm_rope_attn_rope_cast": None},
    "flash_mla.flash_mla_interface": {"FlashMLASchedMeta": object},
}


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        vars(module).update(MODULES[spec.name])
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.insert(0, _StandIn())
