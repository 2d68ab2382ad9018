"""Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["KVARN_FORCE_TRITON"] = "1"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    """The device that kernels run on."""
    return DEVICE


@pytest.fixture(params=["fp16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """A model dtype. Triton's interpreter has no bf16 dot, so bf16 needs a GPU."""
    if request.param == "bf16" and DEVICE == "cpu":
        pytest.skip("Triton's interpreter has no bf16 dot")
    return {"fp16": torch.float16, "bf16": torch.bfloat16}[request.param]
