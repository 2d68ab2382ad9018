"""Compare an engine's functions with what an adapter relies on."""

import dataclasses
import inspect
import pkgutil
from collections.abc import Iterable, Mapping


def signature_differences(rows: Mapping[str, Iterable[str]]) -> list[str]:
    """Return how functions differ from what is relied on, `signature_difference` of each that does."""
    return [found for target, names in rows.items() if (found := signature_difference(target, names)) is not None]


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


def field_differences(target: str, names: Iterable[str]) -> list[str]:
    """Return which fields that are relied on a dataclass lacks, as at most one phrase.

    Args:
        target: dotted path of the class.
        names: of the fields.
    """
    try:
        fields = {field.name for field in dataclasses.fields(pkgutil.resolve_name(target))}
    except (AttributeError, ImportError, TypeError):
        return [f"{target} is not a dataclass"]
    missing = [name for name in names if name not in fields]
    return [f"{target} has no {', '.join(missing)}"] if missing else []
