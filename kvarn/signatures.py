"""Compare an engine's functions with what an adapter relies on."""

import inspect
import pkgutil
from collections.abc import Iterable


def signature_difference(target: str, names: Iterable[str]) -> str | None:
    """Return how a function differs from what is relied on, as a phrase; None if it doesn't.

    Args:
        target: dotted path of a function or method.
        names: parameters that it must take. It may take others only if they have a default.
    """
    try:
        function = pkgutil.resolve_name(target)
    except (AttributeError, ImportError, ValueError):
        return f"{target} does not exist"
    known = set(names)
    parameters = inspect.signature(function).parameters
    missing = sorted(known.difference(parameters))
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    added = [
        name
        for name, parameter in parameters.items()
        if name not in known and parameter.default is inspect.Parameter.empty and parameter.kind not in optional
    ]
    if not missing and not added:
        return None
    takes = [f"no longer takes {', '.join(missing)}"] if missing else []
    demands = [f"also demands {', '.join(added)}"] if added else []
    return f"{target} {' and '.join((*takes, *demands))}"
