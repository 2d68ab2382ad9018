"""A forward hook for SGLang's --forward-hooks: save the hidden states that the language model head reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def save_hidden(config: dict[str, Any]) -> Callable[..., None]:
    """Return a hook that appends every output of the final norm to `config["file"]`, float16, [tokens, hidden]."""
    path = Path(config["file"])

    def hook(_module: torch.nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        with path.open("ab") as file:
            file.write(hidden.detach().to("cpu", torch.float16).numpy().tobytes())

    return hook
