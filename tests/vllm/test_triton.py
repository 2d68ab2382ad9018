"""Kernels with explicit layouts compile for a GPU with the Triton beside vLLM, too, which may not be SGLang's."""

import pytest
from compiled import compiled


@pytest.mark.parametrize(
    "case", ["kvarn_k4v2_g128/128/8", "kvarn_k4v2_g128/128/8/4/verify", "latent/explicit/16", "latent/groups/16"]
)
def test_kernel_compiles(case: str) -> None:
    assert set(compiled(case)) == {case}
