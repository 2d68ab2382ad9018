"""What KVarN can't serve, stated once: limits of the model and of the device, as sentences for a user.

Imports neither torch nor an engine, so that a plan can be checked on any machine. Limits that concern an engine's
own flags stand in that engine's adapter.
"""

from collections.abc import Collection
from dataclasses import dataclass

from kvarn.core.latent.layout import LATENT_DIMS, ROPE_DIMS
from kvarn.core.layers import LayerKind
from kvarn.core.layout import HEAD_DIMS
from kvarn.presets import Preset

_GPU_DTYPES = ("float16", "bfloat16")
_CPU_DTYPES = ("float16", "bfloat16", "float32")
# Ampere: the first with bfloat16 tensor cores and asynchronous copies, which every kernel is written for.
_OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What decides whether a model can be served.

    Args:
        architecture: name of the model class, for messages.
        dtype: dtype of weights and activations, e.g. ``bfloat16``.
        head_dim: channels of a K head.
        v_head_dim: channels of a V head.
        latent_attention: K and V are one compressed latent (MLA).
        latent_dims: channels of the latent and of its rope part; None if there is none or they aren't known.
        encoder_decoder: some layers attend to an encoder's output.
        kinds: of its layers.
        sparse_index: layers choose their tokens through an index cache of their own.
        learned_sinks: the softmax has a learned logit for every head, of a key with value zero.
        alibi: scores carry a bias that grows with distance.
        generates: the model is served to generate text.
    """

    architecture: str
    dtype: str
    head_dim: int
    v_head_dim: int
    latent_attention: bool = False
    latent_dims: tuple[int, int] | None = None
    encoder_decoder: bool = False
    kinds: frozenset[LayerKind] = frozenset({LayerKind.TILES})
    sparse_index: bool = False
    learned_sinks: bool = False
    alibi: bool = False
    generates: bool = True


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What decides whether a device can be used.

    Args:
        kind: ``cuda`` (NVIDIA), ``cpu``, or any other name of a device.
        capability: CUDA compute capability, None for anything but an NVIDIA GPU.
    """

    kind: str
    capability: tuple[int, int] | None = None


def unsupported_reasons(
    facts: ModelFacts,
    preset: Preset,
    device: DeviceFacts,
    beside: Collection[LayerKind] = (),
    *,
    latents: bool = False,
) -> list[str]:
    """Return every reason why the model can't be served on the device, one sentence each; empty if it can.

    Args:
        facts: the model.
        preset: the preset asked for.
        device: where the cache stands.
        beside: kinds of layers that the engine keeps beside those in tiles.
        latents: whether the engine keeps latents (MLA) in tiles.
    """
    return [
        *_architecture_reasons(facts, preset, beside, latents=latents),
        *(_latent_reasons(facts, preset) if facts.latent_attention and latents else _head_reasons(facts, preset)),
        *_device_reasons(facts, device),
    ]


def _architecture_reasons(
    facts: ModelFacts, preset: Preset, beside: Collection[LayerKind], *, latents: bool
) -> list[str]:
    left = facts.kinds - {LayerKind.TILES, LayerKind.NO_CACHE, *beside}
    why_not = (
        (
            facts.latent_attention and not latents,
            "keeps a compressed latent in place of K and V (MLA), which is not cached in tiles here",
        ),
        (facts.encoder_decoder, "attends to an encoder's output, which is not cached in tiles"),
        (LayerKind.MODEL_DTYPE in left, "has sliding-window layers, which can't be kept beside tiles here"),
        (LayerKind.RECURRENT in left, "has linear-attention or Mamba layers, which can't be kept beside tiles here"),
        (LayerKind.UNKNOWN in left, "has layers that cache something else than K and V of their own or a state"),
        (
            not left and LayerKind.TILES not in facts.kinds,
            "has no layer that attends to the whole context, and only those are cached in tiles",
        ),
        (facts.sparse_index, "reads its cache through a sparse index that it stores beside K and V"),
        (
            facts.learned_sinks and facts.latent_attention,
            "adds learned attention sinks to the softmax over latents (MLA), which the kernels don't",
        ),
        (facts.alibi, "adds ALiBi biases to the scores, which the kernels don't"),
        (not facts.generates, "does not generate text here, so that there is no cache to make smaller"),
    )
    return [
        f"The model {facts.architecture} {why}; serve it with --kv-cache-dtype auto instead of {preset.name}."
        for applies, why in why_not
        if applies
    ]


def _head_reasons(facts: ModelFacts, preset: Preset) -> list[str]:
    if facts.latent_attention:
        # Its head widths say nothing about the cache, and it is refused already.
        return []
    reasons = []
    if facts.head_dim not in HEAD_DIMS:
        widths = ", ".join(str(width) for width in HEAD_DIMS)
        reasons.append(
            f"The model's head_dim {facts.head_dim} has no tile layout (there is one for {widths}); "
            f"serve it with --kv-cache-dtype auto instead of {preset.name}."
        )
    if facts.v_head_dim != facts.head_dim:
        reasons.append(
            f"The model's V heads are {facts.v_head_dim} wide and its K heads {facts.head_dim}, but a tile holds both "
            f"at one width; serve it with --kv-cache-dtype auto instead of {preset.name}."
        )
    return reasons


def _latent_reasons(facts: ModelFacts, preset: Preset) -> list[str]:
    if facts.latent_dims is None or (facts.latent_dims[0] in LATENT_DIMS and facts.latent_dims[1] in ROPE_DIMS):
        return []
    latents, ropes = (" or ".join(str(width) for width in widths) for widths in (LATENT_DIMS, ROPE_DIMS))
    latent, rope = facts.latent_dims
    return [
        f"The model's latents of {latent} channels with rope parts of {rope} have no tile layout (there is one for "
        f"{latents} with {ropes}); serve it with --kv-cache-dtype auto instead of {preset.name}."
    ]


def _device_reasons(facts: ModelFacts, device: DeviceFacts) -> list[str]:
    if device.kind not in ("cuda", "cpu"):
        return [f"Device {device.kind!r} has no kernels here; use an NVIDIA GPU (cuda) or, for tests, cpu."]
    reasons = []
    dtypes = _CPU_DTYPES if device.kind == "cpu" else _GPU_DTYPES
    if facts.dtype not in dtypes:
        reasons.append(
            f"The model runs in {facts.dtype}, for which there are no kernels on {device.kind}; "
            f"pass --dtype with one of {', '.join(dtypes)}."
        )
    if device.capability is not None and device.capability < _OLDEST_CAPABILITY:
        found, oldest = (".".join(str(part) for part in pair) for pair in (device.capability, _OLDEST_CAPABILITY))
        reasons.append(
            f"The GPU has compute capability {found}, but the kernels need {oldest} (Ampere) or newer; "
            "use a newer GPU or --kv-cache-dtype auto."
        )
    return reasons
