"""Speculative decoding in SGLang: which drafts can be verified over tiles, and which flags follow from them.

Works on any object that has the flags as attributes, so that it needs no SGLang.
"""

from kvarn.presets import Preset
from kvarn.sglang_backend.compat_tables import BACKEND_NAME

_WITH_MODEL = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")
_NGRAM = "NGRAM"
_CHAINS = (*_WITH_MODEL, _NGRAM)
# What SGLang itself chooses for most models; for some it would be a tree.
_DEFAULT_STEPS = 3
_NOT_TESTED = "have not been tested with tiles"
_NO_BRANCHES = "a rejected branch could not be taken out of a quantised tile"


def drafts_with_model(view: object) -> bool:
    """Tell whether drafts come from a model, which has a cache and an attention backend of its own."""
    return _algorithm(view) in _WITH_MODEL


def declared_draft_flags(view: object) -> dict[str, object]:
    """Return the flags that give a draft model's chain its length, as far as they were not set."""
    if not drafts_with_model(view) or getattr(view, "speculative_adaptive", False):
        return {}
    verified = getattr(view, "speculative_num_draft_tokens", None)
    steps = getattr(view, "speculative_num_steps", None) or (verified - 1 if verified else _DEFAULT_STEPS)
    chain = {"speculative_num_steps": steps, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": steps + 1}
    return {flag: value for flag, value in chain.items() if getattr(view, flag, None) is None}


def draft_reasons(view: object, preset: Preset) -> list[str]:
    """Return why drafts can't be verified, one sentence each; empty if they can, or if there are none.

    Args:
        view: the flags as a user typed them, or as SGLang resolved them.
        preset: the preset asked for.
    """
    algorithm = _algorithm(view)
    if algorithm is None:
        return []
    if algorithm not in _CHAINS:
        return [
            f"--speculative-algorithm {algorithm} can't be used, because its drafts {_why_not(algorithm)}; leave it "
            f"out or use one of {', '.join(_CHAINS)}."
        ]
    reasons = [*_branch_reasons(view, algorithm), *_length_reasons(view, algorithm, preset)]
    if getattr(view, "speculative_draft_attention_backend", None) == BACKEND_NAME:
        reasons.append(
            f"--speculative-draft-attention-backend {BACKEND_NAME} can't be used, because a draft model's cache holds "
            "rows and no records; leave it out."
        )
    if getattr(view, "enable_multi_layer_eagle", False):
        reasons.append(f"--enable-multi-layer-eagle can't be used, because its drafts {_NOT_TESTED}; leave it out.")
    if getattr(view, "enable_mixed_chunk", False):
        reasons.append(
            "--enable-mixed-chunk can't be used with drafts, because the host doesn't know yet how many of a running "
            "request's drafts were accepted when it is put into a chunk; leave one of the two out."
        )
    return reasons


def _algorithm(view: object) -> str | None:
    name = getattr(view, "speculative_algorithm", None)
    return name.upper() if isinstance(name, str) else None


def _why_not(algorithm: str) -> str:
    if algorithm == "FROZEN_KV_MTP":
        return "read raw K and V rows of the model, whose cache holds records"
    return _NOT_TESTED


def _branch_reasons(view: object, algorithm: str) -> list[str]:
    flag = "speculative_ngram_max_bfs_breadth" if algorithm == _NGRAM else "speculative_eagle_topk"
    breadth = getattr(view, flag, None)
    if breadth in (None, 1):
        return []
    option = f"--{flag.replace('_', '-')}"
    return [f"{option} {breadth} makes a tree of drafts, and {_NO_BRANCHES}; pass {option} 1."]


def _length_reasons(view: object, algorithm: str, preset: Preset) -> list[str]:
    verified = getattr(view, "speculative_num_draft_tokens", None) or 0
    if algorithm != _NGRAM:
        # In a chain there is one token a step of the draft model, beside the one that is certain.
        verified = max(verified, (getattr(view, "speculative_num_steps", None) or 0) + 1)
    if verified <= preset.tile_tokens:
        return []
    return [
        f"{verified} tokens to be verified at once, drafts and the one before them, are more than a tile of "
        f"{preset.name} has; set --speculative-num-steps and --speculative-num-draft-tokens so that they are at most "
        f"{preset.tile_tokens}."
    ]
