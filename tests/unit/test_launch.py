"""Launching by code that is remembered: it is found again for arguments of the same kind, and for no others."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvarn.core import launch as launch_module
from kvarn.core.launch import Constants, launch


class Kernel:
    """Counts how often it is compiled, and notes what its code is launched with."""

    arg_names = ("x", "stride", "count", "scale", "BLOCK", "FLAG")

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


BLOCKS = Constants({"BLOCK": 8, "num_warps": 2})
ALIGNED = torch.zeros(64)[:32]


def test_code_is_launched_with_arguments_then_constants_in_the_kernels_order() -> None:
    kernel = Kernel()
    for count in (5, 1 << 20):
        launch(kernel, (3, 2), ALIGNED, 16, count, 0.5, FLAG=True, constants=BLOCKS)
    assert kernel.compiled == [((3, 2), (ALIGNED, 16, 5, 0.5), {"BLOCK": 8, "num_warps": 2, "FLAG": True})]
    assert kernel.launched == [((3, 2, 1), ALIGNED, 16, 1 << 20, 0.5, 8, True)]


@pytest.mark.parametrize(
    "other",
    [
        (ALIGNED[1:], 16, 5, 0.5),
        (ALIGNED.double(), 16, 5, 0.5),
        (ALIGNED, 32, 5, 0.5),
        (ALIGNED, 1, 5, 0.5),
        (ALIGNED, 16, 1 << 40, 0.5),
        (ALIGNED, 16, 5, None),
    ],
    ids=["alignment", "dtype", "value", "one", "wide", "none"],
)
def test_arguments_of_another_kind_are_compiled_for(other: tuple[Any, ...]) -> None:
    kernel = Kernel()
    for args in ((ALIGNED, 16, 5, 0.5), other, other):
        launch(kernel, (1,), *args, FLAG=True, constants=BLOCKS)
    assert (len(kernel.compiled), len(kernel.launched)) == (2, 1)


def test_other_constants_and_kernels_are_compiled_for() -> None:
    kernels = Kernel(), Kernel()
    for kernel in kernels:
        for flag, constants in ((True, BLOCKS), (False, BLOCKS), (True, Constants(BLOCKS.named))):
            launch(kernel, (1,), ALIGNED, 16, 5, 0.5, FLAG=flag, constants=constants)
    assert [(len(kernel.compiled), len(kernel.launched)) for kernel in kernels] == [(3, 0)] * 2


def test_what_is_remembered_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "_MOST_KEYS", 10)
    kernel = Kernel()
    for stride in range(1000):
        launch(kernel, (1,), ALIGNED, stride, 5, 0.5, FLAG=True, constants=BLOCKS)
        assert len(launch_module._compiled) <= 10


def test_interpreted_kernels_are_called_as_ever() -> None:
    calls = []
    kernel = {(4,): lambda *args, **constants: calls.append((args, constants))}
    launch_module._specialized.cache_clear()
    interpreted = type("Interpreted", (), {"__getitem__": lambda _, grid: kernel[grid]})()
    for _ in range(2):
        launch(interpreted, (4,), 1, 2, BLOCK=3)
    assert calls == [((1, 2), {"BLOCK": 3})] * 2
