"""The life cycle runs on the torch references: Triton's interpreter takes milliseconds a launch, and steps are many."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def references_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv("KVARN_FORCE_TRITON", "0")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny here; more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
