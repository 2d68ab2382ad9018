"""Compile kernels for sm_90, with no GPU: `python compile_for_gpu.py CASE ...`.

A case is PRESET/HEAD_DIM/GROUP: the attention kernel with explicit layouts; with /ROWS for several query rows, and
after that /verify where they are in the ring, /canonical, or /few for one request. Or KERNEL/PRESET/HEAD_DIM, with
KERNEL one of KERNELS. Or latent/KERNEL/ROPE_BITS, with KERNEL one of LATENT_KERNELS, and /PRESET after it for other
than 4-bit latents.
Prints a JSON object a case: registers of a thread, bytes of stack, and, of the attention kernel, programs that a
multiprocessor is asked to run and can. Needs an interpreter in which TRITON_INTERPRET is not set: Triton's own accepts
code that its compiler refuses.
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
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from kvarn.core.attend import launch_shape
from kvarn.core.cache import CacheConfig, layout_constants
from kvarn.core.explicit import DECODE_COLUMNS, VERIFY_COLUMNS
from kvarn.core.kernels.append import append_kernel
from kvarn.core.kernels.attend import attend_kernel as plain_attend_kernel
from kvarn.core.kernels.chunk_step import chunk_step_kernel
from kvarn.core.kernels.combine import combine_kernel
from kvarn.core.kernels.gluon.attend import attend_kernel
from kvarn.core.kernels.gluon.latent import attend_latents_kernel as explicit_latents_kernel
from kvarn.core.kernels.gluon.latent_groups import attend_latents_by_groups_kernel
from kvarn.core.kernels.latent.attend import attend_latents_kernel
from kvarn.core.kernels.latent.restore import restore_latents_kernel
from kvarn.core.kernels.latent.rotate import rotate_latents_kernel, rotate_queries_kernel
from kvarn.core.kernels.latent.seal import seal_latents_kernel
from kvarn.core.kernels.merge import merge_kernel, merge_sinks_kernel
from kvarn.core.kernels.restore import restore_kernel
from kvarn.core.kernels.rotate import rotate_kernel, store_tail_kernel
from kvarn.core.kernels.seal import seal_kernel
from kvarn.core.kernels.step import verify_step_kernel
from kvarn.core.kernels.table import pages_kernel
from kvarn.core.kernels.work import count_work_kernel
from kvarn.core.latent.attend import LATENT_COLUMNS
from kvarn.core.latent.layout import LatentLayout, latent_constants
from kvarn.core.layout import TileLayout
from kvarn.core.reference import SCALE_MAX
from kvarn.core.step import power_of_two
from kvarn.core.work import RAW_BLOCK
from kvarn.presets import get_preset

KERNELS = {
    "append": append_kernel,
    "attend": plain_attend_kernel,
    "chunk_step": chunk_step_kernel,
    "combine": combine_kernel,
    "count": count_work_kernel,
    "combine_sinks": combine_kernel,
    "merge": merge_kernel,
    "merge_sinks": merge_sinks_kernel,
    "pages": pages_kernel,
    "restore": restore_kernel,
    "rotate": rotate_kernel,
    "seal": seal_kernel,
    "step": verify_step_kernel,
    "store": store_tail_kernel,
    "verify": verify_step_kernel,
}
LATENT_KERNELS = {
    "attend": attend_latents_kernel,
    "explicit": explicit_latents_kernel,
    "groups": attend_latents_by_groups_kernel,
    "queries": rotate_queries_kernel,
    "restore": restore_latents_kernel,
    "rotate": rotate_latents_kernel,
    "seal": seal_latents_kernel,
}
_VERIFIED = {"SEVERAL": True, "DRAFTS": 4}
_POINTERS = {
    "fp16": ("q_ptr", "k_ptr", "v_ptr", "k_out_ptr", "v_out_ptr", "chunk_k_ptr", "chunk_v_ptr", "tails_ptr")
    + ("sinks_ptr", "signs_ptr", "out_ptr", "part_ptr", "latent_ptr", "rope_ptr", "raw_ptr", "chunk_ptr"),
    "fp32": ("partial_ptr", "partial_lse_ptr", "lse_ptr", "part_lse_ptr", "unit_ptr") + ("sink_logits_ptr",),
    "u8": ("records_ptr",),
    "i64": ("tags_ptr", "owner_ptr"),
}
_TARGET = GPUTarget("cuda", 90, 32)
_KV_HEADS, _TASKS = 8, 64
_SCHEDULERS, _REGISTERS, _SHARED_BYTES = 4, 65536, 228 << 10


def main() -> None:
    """Compile every case of the command line."""
    for case in sys.argv[1:]:
        first, second, third, *more = case.split("/")
        if first == "latent":
            found = latent_resources(second, int(third), *more)
        elif first in KERNELS:
            found = plain_resources(first, second, int(third))
        else:
            found = resources(first, int(second), int(third), int(more[0]) if more else 1, more[1:])
        sys.stdout.write(json.dumps({"case": case, **found}) + "\n")


def resources(preset: str, head_dim: int, group: int, rows: int, kind: list[str]) -> dict[str, int]:
    """Return what one case's attention takes."""
    layout = TileLayout.of(get_preset(preset), head_dim)
    columns = max(DECODE_COLUMNS if rows == 1 else VERIFY_COLUMNS, power_of_two(group * rows))
    config = CacheConfig(layout, _KV_HEADS, tail_tokens=128, sink_tokens=4, ring_tokens=256)
    shape = launch_shape(config, columns, rows, 1 if "few" in kind else _TASKS, torch.device("cuda"))
    constants = _constants(layout, GROUP=group, ROWS=rows, COLUMNS=columns, STAGES=shape.stages, ROOM=shape.room_kib)
    constants |= {"ROWS_IN_RING": rows == 1 or "verify" in kind, "num_warps": shape.warps}
    if "canonical" in kind:
        constants |= {"CANONICAL": True, "TAIL": 0, "SINK": 0}
    options = {"num_warps": shape.warps, "maxnreg": shape.registers, "launch_pdl": True}
    made = triton.compile(
        GluonASTSource(attend_kernel, **_arguments(attend_kernel, constants)), target=_TARGET, options=options
    )
    usage = _usage(made.asm["cubin"])
    # registers are handed out by scheduler, 8 a thread at a time; each program takes 1 KiB of shared memory more
    warps = _SCHEDULERS * (_REGISTERS // _SCHEDULERS // (-(-usage["registers"] // 8) * 8 * 32))
    fitting = min(warps // shape.warps, _SHARED_BYTES // (made.metadata.shared + 1024))
    return {**usage, "programs": shape.programs_per_sm, "fitting": fitting}


def plain_resources(kernel: str, preset: str, head_dim: int) -> dict[str, int]:
    """Return what one of the other kernels takes, in a decode step."""
    layout = TileLayout.of(get_preset(preset), head_dim)
    block = 4 if kernel.startswith("combine") and layout.padded_dim == head_dim else 16
    constants = _constants(layout, BLOCK=block, **(_VERIFIED if kernel == "verify" else {}))
    if kernel.endswith("sinks"):
        del constants["sink_logits_ptr"]
    source = ASTSource(KERNELS[kernel], **_arguments(KERNELS[kernel], constants))
    made = triton.compile(source, target=_TARGET, options={"num_warps": 4, "launch_pdl": True})
    return _usage(made.asm["cubin"])


def latent_resources(kernel: str, rope_bits: int, preset: str = "kvarn_k4v2_g128") -> dict[str, int]:
    """Return what a kernel over latents of DeepSeek's widths takes, in a decode step."""
    layout = LatentLayout.of(get_preset(preset), 512, 64, rope_bits)
    constants = _constants(TileLayout.of(get_preset("kvarn_k4v2_g128"), 128), **latent_constants(layout))
    warps, columns = {"seal": 8}.get(kernel, 4), 64 if kernel == "groups" else LATENT_COLUMNS
    constants |= {"COLUMNS": columns, "GROUP": columns, "TOKENS": 16 if kernel == "restore" else 32}
    constants |= {"STAGES": 3, "BLOCK": 32 if kernel == "seal" else 4, "CHANNELS": 128, "LATENT_CLIP": 1.0}
    constants |= {"LATENT_BITS": layout.latent_bits, "ROPE_BITS": rope_bits, "num_warps": warps}
    made_of = GluonASTSource if kernel in ("explicit", "groups") else ASTSource
    source = made_of(LATENT_KERNELS[kernel], **_arguments(LATENT_KERNELS[kernel], constants))
    made = triton.compile(source, target=_TARGET, options={"num_warps": warps, "launch_pdl": True})
    return {**_usage(made.asm["cubin"]), "shared": made.metadata.shared}


def _constants(layout: TileLayout, **changes: object) -> dict[str, Any]:
    """Return a value for every constant of every kernel."""
    return {
        **layout_constants(layout), "GROUP": 8, "ROWS": 1, "COLUMNS": 8, "RING": 256, "TILES": 1, "TAIL": 128,
        "SINK": 4, "SINKS": True, "SOFTCAP": 0.0, "ROWS_IN_RING": True, "CANONICAL": False, "RAW_BLOCK": RAW_BLOCK,
        "TASK_BLOCK": 128, "SHARE": 1, "STAGES": 2, "CHAINED": True, "USE_ASM": True, "KV_HEADS": _KV_HEADS, "ROOM": 0,
        "NORM": layout.head_dim**-0.5, "ROWS_AT_ONCE": 4, "STORE": True, "CHUNK": 64, "PARTS": 2, "PADDING_PAGES": 1,
        "sink_logits_ptr": None, "DRAFTS": 0, "SEVERAL": False, "TAGGED": True,
        "QP": power_of_two(layout.head_dim // 4),
        "KEY_BITS": layout.key_bits, "VALUE_BITS": layout.value_bits, "KEY_CLIP": 1.0, "VALUE_CLIP": 0.8,
        "SCALE_MAX": SCALE_MAX, **changes,
    }  # fmt: skip


def _arguments(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Return how a kernel's arguments are described to the compiler: constants, types and alignment."""
    own = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in own else _type_of(name) for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if name.endswith(("_ptr", "_stride"))]
    return {"signature": signature, "constexprs": own, "attrs": {(i,): [["tt.divisibility", 16]] for i in aligned}}


def _type_of(name: str) -> str:
    if name.endswith("_ptr"):
        return "*" + next((kind for kind, names in _POINTERS.items() if name in names), "i32")
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
