"""What `kvarn plan`'s arithmetic expects a cache to hold, to stand beside what the server says that it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from kvarn.bench.engines import CacheFacts
from kvarn.checkpoint import Checkpoint
from kvarn.core.capacity import plan_blocks, plan_capacity
from kvarn.errors import CapacityError
from kvarn.presets import get_preset, is_preset_name

# vLLM counts parts of requests of the longest context.
_PARTS = 1000
_MODEL_DTYPES = {"float16": "float16", "half": "float16", "bfloat16": "bfloat16", "float32": "float32"}


def planned_tokens(dtype: str, model: Checkpoint, facts: CacheFacts, baseline_tokens: int) -> int | None:
    """Return the tokens that a preset should hold in the memory in which the baseline holds so many.

    Args:
        dtype: cache dtype.
        model: what is cached of the model; all its kv heads, because ranks don't change the ratio.
        facts: of the preset's server.
        baseline_tokens: tokens that the baseline's server said to hold.

    Returns:
        The tokens; None if the dtype is no preset, some layers hold no tiles, so that tokens don't tell the memory,
        vLLM's longest request is not known, or nothing should fit, as where a server was told tokens and not memory.
    """
    if not is_preset_name(dtype) or model.tile_layers < len(model.layers):
        return None
    shape = model.shape(get_preset(dtype), ranks=1)
    budget = baseline_tokens * shape.raw_bytes_per_token
    if facts.requests is not None:
        with contextlib.suppress(CapacityError):
            return plan_capacity(shape, budget, facts.requests).tokens
        return None
    if facts.longest is None:
        return None
    return plan_blocks(shape, _PARTS * budget, facts.longest) * facts.longest // _PARTS


def model_dtype(command: Sequence[str]) -> str | None:
    """Return the model's dtype that a server's command asks for; None if it leaves that to the checkpoint."""
    given = [value for flag, value in zip(command, command[1:], strict=False) if flag == "--dtype"]
    return _MODEL_DTYPES.get(given[-1]) if given else None
