"""Stand in for a method of an engine that has no hook of its own there."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

# On what stands in.
_MARK = "__kvarn__"


def wrap_once(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Let calls of a method go through `around`. Nothing if they do already.

    Args:
        owner: the class.
        name: of the method, which may be a classmethod.
        around: takes the method as it was, then its arguments, object or class first.

    Raises:
        AttributeError: there is no such method.
    """
    found = inspect.getattr_static(owner, name)
    original = getattr(found, "__func__", found)
    if is_wrapped(original):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped if found is original else type(found)(wrapped))


def is_wrapped(method: Callable[..., Any]) -> bool:
    """Tell whether calls of a method go through ours. They don't if another package replaced it since."""
    return bool(getattr(method, _MARK, False))
