"""Lets vLLM's second model runner start without a GPU: its few Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import os


class _Driver:
    """Says that it is active, which is all that vLLM asks."""

    @staticmethod
    def is_active() -> bool:
        return True


def install() -> None:
    """Give Triton a backend by the name that vLLM looks for. To be called before anything imports vLLM."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import Backend, backends

    backends["cpu"] = Backend(compiler=None, driver=_Driver)
