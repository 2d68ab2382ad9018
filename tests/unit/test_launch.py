"""Launching by code that is remembered: it is found again for arguments of the same kind, and for no others."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvarn.core import launch as launch_module
from kvarn.core.launch import Constants, launch, warmed_up


class Kernel:
    """Counts how often it is compiled, and notes what its code is launched with."""

    __name__ = "slow_kernel"
    arg_names = ("x", "y", "stride", "count", "scale", "bias", "BLOCK", "FLAG")

    def __init__(self) -> None:
        self.params = [SimpleNamespace(do_not_specialize=name == "count") for name in self.arg_names]
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_launch(*args: Any, **constants: Any) -> Any:
            self.compiled.append((grid, args, constants))
            return Code(self)

        return compile_and_launch


class Code:
    """What a kernel was compiled to."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self._kernel.launched.append((grid, *args))


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "_compiled", {})
    monkeypatch.setattr(launch_module, "_parameters", {})
    monkeypatch.setattr(launch_module, "_warmed_up", threading.Event())


BLOCKS = Constants({"BLOCK": 8, "num_warps": 2})
ALIGNED = torch.zeros(64)[:32]


def test_code_is_launched_with_addresses_then_the_other_arguments_and_constants_in_the_kernels_order() -> None:
    kernel, y = Kernel(), torch.zeros(8)
    for count in (5, 1 << 20):
        launch(kernel, (3, 2), ALIGNED, y, 16, count, 0.5, None, FLAG=True, constants=BLOCKS)
    compiled_for = (ALIGNED, y, 16, 5, 0.5, None), {"BLOCK": 8, "num_warps": 2, "FLAG": True}
    assert kernel.compiled == [((3, 2), *compiled_for)]
    assert kernel.launched == [((3, 2, 1), ALIGNED.data_ptr(), y.data_ptr(), 16, 1 << 20, 0.5, None, 8, True)]


@pytest.mark.parametrize(
    "other",
    [
        (ALIGNED[1:], ALIGNED, 16, 5, 0.5, None),
        (ALIGNED, ALIGNED[1:], 16, 5, 0.5, None),
        (ALIGNED, ALIGNED.double(), 16, 5, 0.5, None),
        (ALIGNED, ALIGNED, 32, 5, 0.5, None),
        (ALIGNED, ALIGNED, 1, 5, 0.5, None),
        (ALIGNED, ALIGNED, 16, 1 << 40, 0.5, None),
        (ALIGNED, ALIGNED, 16, -(1 << 40), 0.5, None),
        (ALIGNED, ALIGNED, 16, 5, None, None),
        (ALIGNED, ALIGNED, 16, 5, 0.5, ALIGNED),
        (ALIGNED, ALIGNED, 16, 5, 0.5, ALIGNED[1:]),
    ],
    ids=[
        "alignment",
        "another's",
        "dtype",
        "value",
        "one",
        "wide",
        "wide below",
        "none",
        "tensor",
        "that is unaligned",
    ],
)
def test_arguments_of_another_kind_are_compiled_for(other: tuple[Any, ...]) -> None:
    kernel = Kernel()
    for args in ((ALIGNED, ALIGNED, 16, 5, 0.5, None), other, other):
        launch(kernel, (1,), *args, FLAG=True, constants=BLOCKS)
    assert (len(kernel.compiled), len(kernel.launched)) == (2, 1)


def test_which_of_two_tensors_is_aligned_is_told_apart() -> None:
    kernel = Kernel()
    for x, y in ((ALIGNED[1:], ALIGNED), (ALIGNED, ALIGNED[1:])):
        launch(kernel, (1,), x, y, 16, 5, 0.5, None, FLAG=True, constants=BLOCKS)
    assert (len(kernel.compiled), len(kernel.launched)) == (2, 0)


def test_a_tensor_that_is_missing_later_is_none_from_then_on_and_a_tensor_again() -> None:
    kernel = Kernel()
    for y in (ALIGNED, None, None, ALIGNED, ALIGNED, None):
        launch(kernel, (1,), ALIGNED, y, 16, 5, 0.5, None, FLAG=True, constants=BLOCKS)
    assert [args[1] is None for _, args, _ in kernel.compiled] == [False, True, False]
    assert [args[2] is None for args in kernel.launched] == [True, False, True]


def test_other_constants_and_kernels_are_compiled_for() -> None:
    kernels = Kernel(), Kernel()
    for kernel in kernels:
        for flag, constants in ((True, BLOCKS), (False, BLOCKS), (True, Constants(BLOCKS.named))):
            launch(kernel, (1,), ALIGNED, ALIGNED, 16, 5, 0.5, None, FLAG=flag, constants=constants)
    assert [(len(kernel.compiled), len(kernel.launched)) for kernel in kernels] == [(3, 0)] * 2


def test_what_is_remembered_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "_MOST_KEYS", 10)
    kernel = Kernel()
    for stride in range(1000):
        launch(kernel, (1,), ALIGNED, ALIGNED, stride, 5, 0.5, None, FLAG=True, constants=BLOCKS)
        assert len(launch_module._compiled) <= 10


def test_interpreted_kernels_are_called_as_ever() -> None:
    calls = []
    kernel = {(4,): lambda *args, **constants: calls.append((args, constants))}
    interpreted = type("Interpreted", (), {"__getitem__": lambda _, grid: kernel[grid]})()
    for _ in range(2):
        launch(interpreted, (4,), 1, 2, BLOCK=3)
    assert calls == [((1, 2), {"BLOCK": 3})] * 2


def test_what_is_compiled_after_warm_up_is_told(monkeypatch, caplog) -> None:
    monkeypatch.setattr(launch_module, "_COMPILING_S", 0.0)
    kernel = Kernel()
    launch(kernel, (1,), ALIGNED, ALIGNED, 16, 5, 0.5, None, FLAG=True, constants=BLOCKS)
    assert not caplog.records
    warmed_up()
    for stride in (16, 32, 32):
        launch(kernel, (1,), ALIGNED, ALIGNED, stride, 5, 0.5, None, FLAG=True, constants=BLOCKS)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "compiled slow_kernel while serving" in caplog.text
