"""The life cycle runs on the torch references: Triton's interpreter takes milliseconds a launch, and steps are many."""

import pytest
import torch


@pytest.fixture(autouse=True)
def references_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv("KVARN_FORCE_TRITON", "0")
