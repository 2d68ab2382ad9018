"""Every environment variable that KVarN reads, with its type, default and meaning."""

import os

from kvarn.errors import KVarNError

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"", "0", "false", "no", "off"})
_SGLANG_HOOKS = "KVARN_SGLANG_HOOKS"
# What changes answers or figures.
_MODES = (
    *("KVARN_CANONICAL", "KVARN_BATCH_INVARIANT", "KVARN_TAIL_TOKENS", "KVARN_ROPE_BITS", "KVARN_SCRUB"),
    *("KVARN_FORCE_TRITON", "KVARN_ALLOW_UNTESTED_ENGINE"),
)


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise KVarNError(f"{name}={value!r} is not a switch; set it to 1 or 0.")


def _optional_count(name: str) -> int | None:
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    if not (value.isascii() and value.isdigit()):
        raise KVarNError(f"{name}={value!r} is not a number of tokens; set it to 0 or more.")
    return int(value)


def canonical() -> bool:
    """KVARN_CANONICAL (0): no exact tail, no sinks, and a chunk reads its own full tiles from records.

    Hits, misses, chunkings and schedules then see the same values bit for bit. For tests and debugging.
    """
    return _flag("KVARN_CANONICAL")


def batch_invariant() -> bool:
    """KVARN_BATCH_INVARIANT (0): a row's attention is the same, bit for bit, whatever else is in the batch; slower."""
    return _flag("KVARN_BATCH_INVARIANT")


def order_is_fixed() -> bool:
    """Return whether both are set: what a row reads and in which order it sums no longer depends on the batch."""
    return canonical() and batch_invariant()


def tail_tokens() -> int | None:
    """KVARN_TAIL_TOKENS (unset: the preset's): newest tokens that are always read exact."""
    return _optional_count("KVARN_TAIL_TOKENS")


def rope_bits() -> int:
    """KVARN_ROPE_BITS (16): bits of the rope part in records of latents (MLA), 16 or 8."""
    value = os.environ.get("KVARN_ROPE_BITS", "").strip() or "16"
    if value not in ("16", "8"):
        raise KVarNError(f"KVARN_ROPE_BITS={value!r} is no width of the rope part; set it to 16 or 8.")
    return int(value)


def scrub() -> bool:
    """KVARN_SCRUB (0): overwrite a request's raw tail rows with zeros when the next request takes its slot."""
    return _flag("KVARN_SCRUB")


def force_triton() -> bool:
    """KVARN_FORCE_TRITON (0): run the Triton kernels on CPU tensors too (needs TRITON_INTERPRET=1). For tests."""
    return _flag("KVARN_FORCE_TRITON")


def allow_untested_engine() -> bool:
    """KVARN_ALLOW_UNTESTED_ENGINE (0): accept an engine version outside the tested table if its signatures match."""
    return _flag("KVARN_ALLOW_UNTESTED_ENGINE")


def modes() -> list[str]:
    """Return the variables that are set of those that change answers or figures, as a shell sets them."""
    return [f"{name}={os.environ[name]}" for name in _MODES if os.environ.get(name)]


def commit() -> str:
    """KVARN_COMMIT (empty: ask git): the commit that result files name, where there is no git."""
    return os.environ.get("KVARN_COMMIT", "")


def inherited() -> dict[str, str]:
    """Return this process's environment, for the servers and clients that it starts."""
    return dict(os.environ)


def sglang_hooks() -> bool:
    """KVARN_SGLANG_HOOKS (0; KVarN sets it itself): a kvarn dtype was asked for in the process that launched SGLang.

    Schedulers inherit it and only then install the hooks that touch memory pools, so that runs without a kvarn
    dtype are left alone.
    """
    return _flag(_SGLANG_HOOKS)


def request_sglang_hooks() -> None:
    """Set KVARN_SGLANG_HOOKS for the processes that this one starts."""
    os.environ[_SGLANG_HOOKS] = "1"
