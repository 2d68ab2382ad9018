"""Every exception that KVarN raises on purpose."""

from collections.abc import Sequence


class KVarNError(Exception):
    """Base of all errors raised by KVarN."""


class UnknownPreset(KVarNError, ValueError):
    """The cache dtype is not a preset of this version."""


class UnsupportedConfig(KVarNError, ValueError):
    """The model, flags or device ask for something that KVarN can't serve.

    Args:
        reasons: one sentence each: what, why and what to do.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        listed = "\n".join(f"  - {reason}" for reason in self.reasons)
        super().__init__(f"KVarN can't serve this configuration:\n{listed}")


class EngineIncompatible(KVarNError, RuntimeError):
    """The installed engine is not one that this version of KVarN was tested with."""


class CapacityError(KVarNError, ValueError):
    """The memory budget is too small for the cache that was asked for."""
