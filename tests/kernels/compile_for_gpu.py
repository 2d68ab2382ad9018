"""Compile the attention kernel with explicit layouts for sm_90, with no GPU: `python compile_for_gpu.py CASE ...`.

A case is PRESET/HEAD_DIM/GROUP, with /ROWS for several query rows. Prints a JSON object a case: registers of a thread,
bytes of stack, and programs that a multiprocessor is asked to run and can. Needs an interpreter in which
TRITON_INTERPRET is not set.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from kvarn.core.attend import launch_shape
from kvarn.core.cache import layout_constants
from kvarn.core.kernels.gluon.attend import attend_kernel
from kvarn.core.layout import TileLayout
from kvarn.core.step import CHUNK_COLUMNS, DECODE_COLUMNS, power_of_two
from kvarn.core.work import RAW_BLOCK
from kvarn.presets import get_preset

_POINTERS = {
    "records_ptr": "u8",
    "tails_ptr": "fp16",
    "sinks_ptr": "fp16",
    "chunk_k_ptr": "fp16",
    "chunk_v_ptr": "fp16",
}
_SCHEDULERS, _REGISTERS, _SHARED_BYTES = 4, 65536, 228 << 10
_FLOATS = ("q_ptr", "partial_ptr", "partial_lse_ptr")


def main() -> None:
    """Compile every case of the command line."""
    for case in sys.argv[1:]:
        preset, head_dim, group, *rows = case.split("/")
        found = resources(preset, int(head_dim), int(group), int(rows[0]) if rows else 1)
        sys.stdout.write(json.dumps({"case": case, **found}) + "\n")


def resources(preset: str, head_dim: int, group: int, rows: int) -> dict[str, int]:
    """Return what one case's machine code takes."""
    layout = TileLayout.of(get_preset(preset), head_dim)
    columns = max(DECODE_COLUMNS if rows == 1 else CHUNK_COLUMNS, power_of_two(group * rows))
    shape = launch_shape(layout, columns, torch.device("cuda"))
    constants: dict[str, Any] = {
        **layout_constants(layout), "GROUP": group, "ROWS": rows, "COLUMNS": columns, "RING": 256, "TILES": 1,
        "TAIL": 128, "SINK": 4, "SOFTCAP": 0.0, "ROWS_IN_RING": rows == 1, "CANONICAL": False,
        "RAW_BLOCK": RAW_BLOCK, "TASK_BLOCK": 128, "SHARE": 1, "STAGES": shape.stages, "CHAINED": True,
        "num_warps": shape.warps,
    }  # fmt: skip
    signature, attributes = {}, {}
    for i, name in enumerate(attend_kernel.arg_names):
        signature[name] = "constexpr" if name in constants else _type_of(name)
        if name.endswith(("_ptr", "_stride")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(attend_kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": shape.warps, "maxnreg": shape.registers, "launch_pdl": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    usage = _usage(made.asm["cubin"])
    # registers are handed out by scheduler, 8 a thread at a time; each program takes 1 KiB of shared memory more
    warps = _SCHEDULERS * (_REGISTERS // _SCHEDULERS // (-(-usage["registers"] // 8) * 8 * 32))
    fitting = min(warps // shape.warps, _SHARED_BYTES // (made.metadata.shared + 1024))
    return {**usage, "programs": shape.programs_per_sm, "fitting": fitting}


def _type_of(name: str) -> str:
    if name.endswith("_ptr"):
        return "*" + _POINTERS.get(name, "fp32" if name in _FLOATS else "i32")
    return "fp32" if name == "scale" else "i32"


def _usage(cubin: bytes) -> dict[str, int]:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr).groups()
    return {"registers": int(registers), "stack": int(stack)}


if __name__ == "__main__":
    main()
