"""What a kvarn dtype decides for SGLang's other flags, and which flags it refuses.

Works on any object that has the flags as attributes, so that it needs no SGLang.
"""

from kvarn import env
from kvarn.limits import Limit, limit_reasons
from kvarn.presets import Preset
from kvarn.sglang_backend.compat_tables import BACKEND_NAME
from kvarn.sglang_backend.drafts import draft_reasons

_BACKEND_FLAGS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
_DISABLED = "disabled"
# Chunks replayed in pieces, between which attention runs as it does without graphs.
_BREAKABLE = "breakable"
_NOT_TESTED = "it has not been tested with tiles"
_HOST_COPIES = "it copies K and V by token, and a record holds a whole tile of tokens"
_SPLIT_CACHE = "it spreads one request's cache over ranks, and its exact tail stands on one"
_OTHER_POOL = "it brings a cache layout of its own"
_RAW_ROWS = "it reads raw K and V rows, and the cache holds records"
_IDLE_RANKS = "idle ranks run batches without requests, which has not been tested with tiles"
_BATCH_DEPENDENT = "results depend on how a batch is put together"
_NEWEST_TOKENS = "a request's newest tokens stand in its tail, which no transfer carries"


FLAG_LIMITS = (
    Limit("enable_hierarchical_cache", None, _HOST_COPIES),
    Limit("enable_lmcache", None, _HOST_COPIES),
    Limit("enable_flexkv", None, _HOST_COPIES),
    Limit("enable_unified_cache_external_linker", None, _HOST_COPIES),
    Limit("radix_cache_backend", None, _NOT_TESTED),
    Limit("disaggregation_mode", "null", _NEWEST_TOKENS),
    Limit("enable_pd_role_switch", None, _NEWEST_TOKENS),
    Limit("enable_unified_memory", None, _OTHER_POOL),
    Limit("enable_page_major_kv_layout", None, _OTHER_POOL),
    Limit("prefill_only_disable_kv_cache", None, "it leaves out the cache that tiles stand in"),
    Limit("enable_hisparse", None, _OTHER_POOL),
    Limit("enable_kv_cache_sharding", None, _SPLIT_CACHE),
    Limit("dcp_size", 1, _SPLIT_CACHE),
    Limit("attn_cp_size", 1, _SPLIT_CACHE),
    Limit("enable_prefill_cp", None, _SPLIT_CACHE),
    Limit("enable_prefill_context_parallel", None, _SPLIT_CACHE),
    Limit("enable_dsa_prefill_context_parallel", None, _SPLIT_CACHE),
    Limit("pp_size", 1, "stages would size their caches apart from each other (tensor parallelism works)"),
    Limit("attn_dp_size", 1, _IDLE_RANKS),
    Limit("enable_dp_attention", None, _IDLE_RANKS),
    Limit("enable_two_batch_overlap", None, "two half batches would write the same tails at once"),
    Limit("enable_pdmux", None, "prefill and decode would write tails on two streams at once"),
    Limit("dllm_algorithm", None, "a diffusion model rewrites tokens that a sealed tile holds already"),
    Limit("enable_streaming_session", None, _NOT_TESTED),
    Limit("enable_session_radix_cache", None, _NOT_TESTED),
    Limit("uno_lora_path", None, _NOT_TESTED),
    Limit("decoupled_spec_role", "null", _NOT_TESTED),
    Limit("rl_on_policy_target", None, _BATCH_DEPENDENT),
    Limit("kv_canary", "none", _RAW_ROWS),
    Limit("enable_mis", None, "it needs the attention mask of the flashinfer backend"),
    Limit("enable_nvidia_megakernel", None, _RAW_ROWS),
    Limit("enable_amd_monokernel", None, _RAW_ROWS),
    Limit("enable_memory_saver", None, "paused memory comes back with arbitrary contents, tails included"),
    Limit("use_ray", None, "its workers don't inherit what the launching process decided"),
)
_DETERMINISTIC = Limit(
    "enable_deterministic_inference",
    None,
    f"{_BATCH_DEPENDENT} unless KVARN_CANONICAL=1 and KVARN_BATCH_INVARIANT=1 are set",
)


def declared_flags(preset: Preset, *, chunk_graphs: bool) -> dict[str, object]:
    """Return the flags that follow from the preset.

    Args:
        preset: the preset asked for.
        chunk_graphs: whether prefill may be captured in CUDA graphs, breakable ones.
    """
    flags = {"attention_backend": BACKEND_NAME, "page_size": preset.tile_tokens}
    return flags if chunk_graphs else {**flags, "disable_prefill_cuda_graph": True}


def asks_for_backend(view: object) -> bool:
    """Tell whether a flag names our attention backend, whatever the cache dtype is."""
    return any(getattr(view, flag, None) == BACKEND_NAME for flag in _BACKEND_FLAGS)


def flag_reasons(view: object, preset: Preset, *, chunk_graphs: bool) -> list[str]:
    """Return why the flags can't be served with the preset, one sentence each; empty if they can.

    Args:
        view: the flags as a user typed them, or as SGLang resolved them.
        preset: the preset asked for.
        chunk_graphs: whether prefill may be captured in CUDA graphs, breakable ones.
    """
    limits = FLAG_LIMITS if env.order_is_fixed() else (*FLAG_LIMITS, _DETERMINISTIC)
    return [
        *_backend_reasons(view, preset),
        *_graph_reasons(view, chunk_graphs),
        *_page_reasons(view, preset),
        *draft_reasons(view, preset),
        *limit_reasons(limits, view, "leave it out or serve with --kv-cache-dtype auto"),
    ]


def final_reasons(view: object, preset: Preset, *, chunk_graphs: bool) -> list[str]:
    """Return why the flags as SGLang resolved them can't be served: those above, and decisions of ours that were lost.

    Args:
        view: the flags at the end of SGLang's resolution.
        preset: the preset asked for.
        chunk_graphs: whether prefill may be captured in CUDA graphs, breakable ones.
    """
    reasons = flag_reasons(view, preset, chunk_graphs=chunk_graphs)
    expected = {"kv_cache_dtype": preset.name, **declared_flags(preset, chunk_graphs=chunk_graphs)}
    for flag, value in expected.items():
        found = getattr(view, flag, None)
        reported = flag in ("attention_backend", "page_size") and found is not None
        if found != value and not reported:
            reasons.append(
                f"SGLang resolved {flag} to {found!r}, but {preset.name} needs {value!r}; leave out the flags that "
                "decide it or, if the model does, serve it with --kv-cache-dtype auto."
            )
    prefill = getattr(getattr(view, "cuda_graph_config", None), "prefill", None)
    if prefill is not None and prefill.backend not in _graph_backends(chunk_graphs):
        reasons.append(_graph_reason(f"--cuda-graph-config with the prefill backend {prefill.backend!r}", chunk_graphs))
    return reasons


def _backend_reasons(view: object, preset: Preset) -> list[str]:
    reasons = []
    for flag in _BACKEND_FLAGS:
        value = getattr(view, flag, None)
        if value not in (None, BACKEND_NAME):
            reasons.append(
                f"--{flag.replace('_', '-')} {value} can't read the records of {preset.name}, only the backend "
                f"{BACKEND_NAME!r} can; leave the flag out."
            )
    return reasons


def _graph_backends(chunk_graphs: bool) -> tuple[str, ...]:
    return (_DISABLED, _BREAKABLE) if chunk_graphs else (_DISABLED,)


def _graph_reasons(view: object, chunk_graphs: bool) -> list[str]:
    asked = getattr(view, "cuda_graph_backend_prefill", None)
    if asked in (None, *_graph_backends(chunk_graphs)):
        return []
    return [_graph_reason(f"--cuda-graph-backend-prefill {asked}", chunk_graphs)]


def _graph_reason(asked: str, chunk_graphs: bool) -> str:
    why = (
        "how a chunk attends to tiles follows from its lengths, so that graphs must leave attention out"
        if chunk_graphs
        else "prefill in graphs has not been tested with latents (MLA), or in this version of SGLang"
    )
    fitting = " or ".join(map(repr, _graph_backends(chunk_graphs)))
    return f"{asked} can't be used, because {why}; leave it out or use {fitting} (decode graphs stay on)."


def _page_reasons(view: object, preset: Preset) -> list[str]:
    reasons = []
    tile = preset.tile_tokens
    page_size = getattr(view, "page_size", None)
    if page_size not in (None, tile):
        reasons.append(
            f"--page-size {page_size} does not fit {preset.name}, whose page is its tile of {tile} tokens; "
            "leave the flag out."
        )
    chunk = getattr(view, "chunked_prefill_size", None)
    if chunk is not None and chunk > 0 and chunk % tile:
        reasons.append(
            f"--chunked-prefill-size {chunk} is not a multiple of the page of {tile} tokens, at which prompts are "
            f"cut; use {max(tile, chunk // tile * tile)}."
        )
    tokens = getattr(view, "max_total_tokens", None)
    if tokens is not None and tokens < tile:
        reasons.append(f"--max-total-tokens {tokens} holds no page of {tile} tokens; use {tile} or more.")
    return reasons
