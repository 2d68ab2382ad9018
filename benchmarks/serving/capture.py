"""Forward hooks: save the hidden states that the language model head reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def append_hidden(path: Path, _module: torch.nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
    """Append an output of the final norm to a file, float16, [tokens, hidden]."""
    hidden = output[0] if isinstance(output, tuple) else output
    with path.open("ab") as file:
        file.write(hidden.detach().to("cpu", torch.float16).numpy().tobytes())


def save_hidden(config: dict[str, Any]) -> Callable[..., None]:
    """Return a hook that writes to `config["file"]`: a factory for SGLang's --forward-hooks."""
    return functools.partial(append_hidden, Path(config["file"]))
