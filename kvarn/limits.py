"""Settings of an engine that must keep their defaults, and what a user is told who changed one."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Limit:
    """One setting.

    Args:
        path: attribute of the engine's configuration, dotted.
        default: the value that is served, beside None and False.
        why: no other value is; ends the sentence "... can't be used, because".
        flag: what a user types; None if it is the attribute's name with dashes, followed by the value.
    """

    path: str
    default: object
    why: str
    flag: str | None = None

    def reason(self, config: object, remedy: str = "leave it out") -> str | None:
        """Return the sentence for a user who changed it; None if it is unchanged or this engine doesn't have it."""
        value: Any = config
        for name in self.path.split("."):
            value = getattr(value, name, None)
        if value is None or value is False or value == self.default:
            return None
        return f"{self.flag or _typed(self.path, value)} can't be used, because {self.why}; {remedy}."


def limit_reasons(limits: Iterable[Limit], config: object, remedy: str = "leave it out") -> list[str]:
    """Return the sentences of all settings that were changed.

    Args:
        limits: the settings.
        config: the engine's configuration.
        remedy: what a user may do; ends each sentence.
    """
    found = (limit.reason(config, remedy) for limit in limits)
    return [reason for reason in found if reason is not None]


def _typed(name: str, value: object) -> str:
    option = f"--{name.replace('_', '-')}"
    return option if value is True else f"{option} {value}"
