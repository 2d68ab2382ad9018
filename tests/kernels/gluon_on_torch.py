"""Run a kernel with explicit layouts on CPU tensors, program by program: its Python over torch, with layouts left out.

Gluon has no interpreter. What a kernel computes doesn't depend on where in registers it does: so this says whether it
reads, masks, unpacks and sums what it should. Whether layouts fit together the compiler says (`test_compile.py`).
Shared memory begins as NaN, copies to it are done at once, and MMAs of warp groups read it as late as they may, so a
value that is overwritten too early is noticed. Warps that are specialised run by turns, which are drawn anew wherever
one of them could wait.
"""

import ast
import inspect
import itertools
import math
import random
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

_KERNELS = "kvarn.core.kernels"
_HELPERS = ("read_rule", "work", "task", "address", "hadamard", "unpack")  # each after those that it needs
_LAYOUTS = ("SliceLayout", "DotOperandLayout", "BlockedLayout", "SwizzledSharedLayout", "DistributedLinearLayout")
_LAYOUTS += ("NVMMADistributedLayout", "NVMMASharedLayout")
_PLANE = re.compile(r"(?:shr\.b32 t, \$1, (\d+); )?and\.b32 \$0, (?:t|\$1), 0x(\w+);")
_RESTORING = re.compile(r"(?:shr\.b32 t, \$1, (\d+);|mov\.b32 t, \$1;) lop3\.b32 t, t, 0x(\w+)")
_PARTNER = re.compile(r"shfl\.sync\.bfly\.b32 \$0, \$1, (\d+), 31")


class Pointer:
    """Addresses in a tensor's storage: an element type, and offsets in elements."""

    def __init__(self, storage: torch.Tensor, at: Any) -> None:
        self.storage, self.at = storage, at
        self.dtype = SimpleNamespace(element_ty=storage.dtype)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Pointer":
        flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        return cls(flat, tensor.storage_offset())

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.storage, self.at + offset)

    def __sub__(self, offset: Any) -> "Pointer":
        return self + -offset

    def to(self, dtype: torch.dtype) -> "Pointer":
        return Pointer(self.storage.view(dtype), self.at * self.storage.itemsize // dtype.itemsize)

    def load(self, mask: Any = None, other: Any = 0, **_: object) -> torch.Tensor:
        at = torch.as_tensor(self.at)
        if mask is None:
            return self.storage[at]
        at, mask = torch.broadcast_tensors(at, torch.as_tensor(mask))
        return torch.where(mask, self.storage[torch.where(mask, at, 0)], torch.tensor(other, dtype=self.storage.dtype))

    def store(self, value: Any, mask: Any = True) -> None:
        value = torch.as_tensor(value)
        at, mask, value = torch.broadcast_tensors(torch.as_tensor(self.at), torch.as_tensor(mask), value)
        self.storage[at[mask]] = value[mask].to(self.storage.dtype)


class Shared:
    """Shared memory."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.shape = values, tuple(values.shape)

    @classmethod
    def allocate(cls, dtype: torch.dtype, shape: Iterable[int], _: object) -> "Shared":
        return cls(torch.full(tuple(shape), math.nan if dtype.is_floating_point else -1, dtype=dtype))

    def index(self, i: Any) -> "Shared":
        return Shared(self.values[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.values.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.values.permute(order))

    def reinterpret(self, dtype: torch.dtype, shape: Iterable[int], _: object) -> "Shared":
        """Of blocks of 64 numbers a row: as they are, or with neighbouring ones side by side."""
        shape = tuple(shape)
        if len(shape) < 3:
            return Shared(self.values.view(dtype).view(shape))
        rows, each = self.shape[1], shape[2] // self.shape[2]
        parts = self.values[: shape[0] * each].view(shape[0], each, rows, -1)
        return SideBySide(parts.transpose(1, 2))

    def load(self, _: object = None) -> torch.Tensor:
        return self.values.clone()

    def store(self, values: torch.Tensor) -> None:
        self.values.copy_(values)


class SideBySide(Shared):
    """Shared memory whose rows are blocks that stand apart, [..., rows, blocks, 64]."""

    def index(self, i: Any) -> "SideBySide":
        return SideBySide(self.values[int(i)])

    def load(self, _: object = None) -> torch.Tensor:
        return self.values.flatten(-2)

    def store(self, values: torch.Tensor) -> None:
        self.values.copy_(values.view(self.values.shape))


def _unpacked(asm: str, _: str, words: list[torch.Tensor], **__: object) -> torch.Tensor:
    """Do what `codes._code_asm` says to pairs of packed words."""
    found = _PLANE.search(asm)
    if asm == "prmt.b32 $0, $1, 0, 0x4341;":  # the upper byte of each half
        down, mask = "8", "00FF00FF"
    elif found:
        down, mask = found.groups()
    else:
        return _restored(asm, *words)
    pairs = words[0].contiguous().view(torch.int32).long() & 0xFFFFFFFF
    pairs = pairs >> int(down or 0) & int(mask, 16)
    return torch.where(pairs >= 1 << 31, pairs - (1 << 32), pairs).to(torch.int32).view(torch.float16)


def _inline_asm(asm: str, constraints: str, values: list[torch.Tensor], **more: object) -> torch.Tensor:
    """Do what a kernel's PTX says: the codes of packed words, or the channels of another thread of a warp."""
    found = _PARTNER.search(asm)
    if asm.startswith("prefetch"):
        return torch.tensor(0)
    if not found:
        return _unpacked(asm, constraints, values, **more)
    channels = torch.arange(values[0].shape[0])
    return values[0][channels ^ 4 * int(found[1])]  # a thread has 4 neighbours


def _restored(asm: str, words: torch.Tensor, scale: torch.Tensor, offset: Any = 0.0) -> torch.Tensor:
    """Do what `codes._number_asm` says, to multiply codes and to add offsets if there are any."""
    down, mask = _RESTORING.search(asm).groups()
    codes = ((words.int() & 0xFFFF) >> int(down or 0)) & int(mask, 16) & 0xFFFF
    return (codes.double() * scale.double() + torch.as_tensor(offset).double()).half()


class _Running:
    """The result of an MMA of a warp group that may still read its operands."""

    def __init__(self, a: Any, b: Shared, acc: "torch.Tensor | _Running") -> None:
        self._operands: Any = a, b, acc
        self._result: torch.Tensor | None = None

    def finish(self) -> torch.Tensor:
        if self._result is None:
            a, b, acc = self._operands
            acc = acc.finish() if isinstance(acc, _Running) else acc
            a = a.load() if isinstance(a, Shared) else a
            self._result, self._operands = acc + a.float() @ b.load().float(), None
        return self._result


_mmas = threading.local()  # those that run, of a thread that stands for a group of warps


def _warpgroup_mma(a: Any, b: Shared, acc: Any, is_async: bool = False) -> Any:
    started = _Running(a, b, acc)
    if not is_async:
        return started.finish()
    _mmas.running = [*getattr(_mmas, "running", []), started]
    return started


def _warpgroup_mma_wait(pending: int, deps: list[Any]) -> Any:
    _turns.draw()
    running = getattr(_mmas, "running", [])
    ended = running[: len(running) - pending]
    for one in ended:
        one.finish()
    _mmas.running = running[len(ended) :]
    found = [x.finish() if isinstance(x, _Running) and x not in _mmas.running else x for x in deps]
    return found[0] if len(found) == 1 else found


class _Turns:
    """Which of the specialised groups of warps runs: one at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[int, Callable[[], bool]] = {}
        self._turn = 0
        self._random = random.Random(0)

    def run(self, groups: list[Callable[[], None]]) -> None:
        """Run all groups to their ends, or raise what went wrong in one."""
        self._waiting = {which: lambda: True for which in range(len(groups))}
        self._turn = self._random.randrange(len(groups))
        with ThreadPoolExecutor(len(groups)) as pool:
            for one in [pool.submit(self._run_one, which, group) for which, group in enumerate(groups)]:
                one.result()

    def _run_one(self, which: int, group: Callable[[], None]) -> None:
        _mmas.group = which
        try:
            self._wait_for_turn()
            group()
        finally:
            with self._changed:
                del self._waiting[which]
                self._pass_on()

    def draw(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Give another group its turn, perhaps, and go on once it is this one's again and something is ready."""
        if getattr(_mmas, "group", None) is None:
            return
        with self._changed:
            self._waiting[_mmas.group] = ready
            self._pass_on()
        self._wait_for_turn()

    def _pass_on(self) -> None:
        able = [which for which, ready in self._waiting.items() if ready()]
        # nobody's if all wait for one another: then all of them say so
        self._turn = self._random.choice(able) if able else -1
        self._changed.notify_all()

    def _wait_for_turn(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn in (_mmas.group, -1))
            assert self._turn == _mmas.group, "groups of warps wait for one another"


_turns = _Turns()


class _Barriers:
    """Barriers in shared memory: a number for the arrivals that a phase has, and one for those up to now."""

    @staticmethod
    def init(barrier: Shared, count: int) -> None:
        barrier.values[0] = count << 32

    @staticmethod
    def arrive(barrier: Shared) -> None:
        barrier.values[0] += 1
        _turns.draw()

    @staticmethod
    def wait(barrier: Shared, parity: Any) -> None:
        def passed() -> bool:
            count, arrivals = divmod(int(barrier.values[0]), 1 << 32)
            return arrivals // count % 2 != int(parity)

        _turns.draw(passed)


def _tensors(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *values: function(*map(torch.as_tensor, values))


def _where(condition: Any, a: Any, b: Any) -> torch.Tensor:
    dtype = next((x.dtype for x in (a, b) if torch.is_tensor(x)), None)
    return torch.where(torch.as_tensor(condition), *(torch.as_tensor(x, dtype=dtype) for x in (a, b)))


def _float(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    return lambda x: function(torch.as_tensor(x, dtype=torch.float32))


_program = [0, 0, 0]
_programs = [1, 1, 1]
_LANGUAGE = SimpleNamespace(
    constexpr=lambda x: x, static_range=range, range=lambda *bounds, **_: range(*bounds), pointer_type=lambda x: x,
    float16=torch.float16, float32=torch.float32, int16=torch.int16, int32=torch.int32, int64=torch.int64,
    program_id=lambda axis: torch.tensor(_program[axis]), num_programs=lambda axis: _programs[axis],
    load=lambda pointer, **more: pointer.load(**more), store=lambda pointer, x, **more: pointer.store(x, **more),
    allocate_shared_memory=Shared.allocate, inline_asm_elementwise=_inline_asm,
    arange=lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
    full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
    zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    minimum=_tensors(torch.minimum), maximum=_tensors(torch.maximum), where=_where, abs=torch.abs,
    max=lambda x, axis: x.amax(axis), min=lambda x, axis: x.amin(axis), sum=lambda x, axis: x.sum(axis),
    exp2=_float(torch.exp2), log2=_float(torch.log2), ceil=_float(torch.ceil),
    cdiv=lambda a, b: (a + b - 1) // b,
    join=lambda a, b: torch.stack((a, b), dim=-1), split=lambda x: x.unbind(dim=-1),
    permute=lambda x, order: x.permute(order), reshape=lambda x, shape: x.reshape(shape),
    expand_dims=lambda x, axis: x.unsqueeze(axis), broadcast=torch.broadcast_tensors,
    convert_layout=lambda x, *_, **__: x, barrier=lambda: None, shared_memory_descriptor=Shared,
    warp_specialize=lambda groups, *_: _turns.run([partial(function, *args) for function, args in groups]),
    **dict.fromkeys(_LAYOUTS, lambda *_, **__: None),
)  # fmt: skip
_GIVEN = {
    "gl": _LANGUAGE,
    "tl": _LANGUAGE,
    "mma_v2": lambda a, b, c: c + a.float() @ b.float(),
    "warpgroup_mma": _warpgroup_mma,
    "warpgroup_mma_init": lambda x: x,
    "warpgroup_mma_wait": _warpgroup_mma_wait,
    "fence_async_shared": lambda: None,
    "mbarrier": SimpleNamespace(
        init=_Barriers.init, arrive=_Barriers.arrive, wait=_Barriers.wait, MBarrierLayout=lambda: None
    ),
    "async_copy": SimpleNamespace(
        async_load=lambda shared, pointer: shared.store(pointer.load()),
        commit_group=lambda: None,
        wait_group=lambda pending: None,
    ),
    "allow_next": lambda chained: None,
    "wait_for_previous": lambda chained: None,
    "wait_for_queries": lambda fills, chained: None,
}


# Of the compiler, not of kernels.
_OPTIONS = {"maxnreg", "launch_pdl", "num_warps"}


class _Plain(ast.NodeTransformer):
    """Leaves of a kernel's module what Python can run: no imports, decorators, annotations and layouts of values."""

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = []
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        assert node.value is not None
        return ast.copy_location(ast.Assign([node.target], self.visit(node.value)), node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if node.attr == "layout" and isinstance(node.value, ast.Attribute) and node.value.attr == "type":
            return ast.copy_location(ast.Constant(None), node)
        return self.generic_visit(node)


class Emulated:
    """A kernel of `kernels.gluon`, launched as Triton's are."""

    def __init__(self, module: str, function: str, *others: str) -> None:
        names = dict(_GIVEN)
        for name in (*_HELPERS, "gluon.layouts", "gluon.program", *others, module):
            tree = ast.fix_missing_locations(_Plain().visit(ast.parse(_source(name))))
            own = dict(names)
            exec(compile(tree, name, "exec"), own)  # noqa: S102 (the project's own kernels)
            names |= {name: value for name, value in own.items() if not name.startswith("_")}
        self._function = names[function]
        self._parameters = set(inspect.signature(self._function).parameters)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **constants: Any) -> None:
            given = [Pointer.of(x) if torch.is_tensor(x) else x for x in args]
            named = {name: value for name, value in constants.items() if name in self._parameters}
            assert set(constants) - set(named) <= _OPTIONS, "the compiler knows no such constant"
            _programs[:] = (*grid, 1, 1)[:3]
            for place in itertools.product(*(range(size) for size in _programs)):
                _program[:] = place
                self._function(*given, **named)

        return run


def _source(name: str) -> str:
    spec = find_spec(f"{_KERNELS}.{name}")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text()
