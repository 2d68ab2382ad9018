"""Warm-up launches every variant of a kernel that steps launch, told without a GPU by what Triton compiles anew for."""

import itertools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import ints

from kvarn.core import attend as attend_module
from kvarn.core import combine as combine_module
from kvarn.core import explicit
from kvarn.core import launch as launch_module
from kvarn.core.attention import attention
from kvarn.core.cache import CacheConfig, allocate_layer
from kvarn.core.chunk_step import chunk_step
from kvarn.core.explicit import VERIFY_COLUMNS
from kvarn.core.flash import flash_for
from kvarn.core.latent.attend import latent_shape
from kvarn.core.latent.attention import expanded_attention, latent_attention
from kvarn.core.latent.expand import ExpandedHeads
from kvarn.core.latent.layout import LatentLayout
from kvarn.core.latent.rows import LatentRows
from kvarn.core.latent.warm_up import warm_up_latents
from kvarn.core.layout import TileLayout
from kvarn.core.prefill_plan import LONG_ROWS, plan_prefill
from kvarn.core.step import Step, verify_step
from kvarn.core.tail import TailState
from kvarn.core.warm_up import warm_up
from kvarn.presets import get_preset

HEADS, KV_HEADS, HEAD_DIM, TILE = 4, 1, 64, 128
DTYPE, CPU = torch.float16, torch.device("cpu")
# Prefixes and new rows of each request; a room of one tile for cached keys makes pieces.
CHUNKS = {
    "short": ([0, 40, 128], [3, 9, LONG_ROWS]),
    "many short": ([0] * 40, [10] * 40),
    "first": ([0], [LONG_ROWS + 6]),
    "first, several": ([0] * 17, [TILE] * 17),
    "first, long": ([0], [5 * TILE + 3]),
    "hit": ([TILE], [LONG_ROWS + 2]),
    "hits": ([2 * TILE, 3 * TILE], [70, 600]),
    "continued inside a tile": ([TILE + 5], [200]),
    "mixed": ([300, 0, 2 * TILE], [1, 300, 40]),
}
PIECES = {
    "two": ([TILE], [LONG_ROWS + 2]),
    "three": ([2 * TILE], [200]),
    "many, beside others": ([5 * TILE, 0, 4 * TILE + 7], [600, 70, 1]),
}
Variants = set[tuple[object, ...]]


@pytest.fixture
def launched(device: str, monkeypatch: pytest.MonkeyPatch) -> Variants:
    """Note variants instead of launching them."""
    if device != "cpu":
        pytest.skip("tells variants by what the interpreter knows of kernels")
    found: Variants = set()

    def note(kernel: Any, _: object, *args: object, constants: Any = launch_module._NONE, **more: object) -> None:
        found.add(variant_of(kernel, args, {**constants.named, **more}))

    monkeypatch.setenv("KVARN_FORCE_TRITON", "1")
    original = launch_module.launch
    for name, module in list(sys.modules.items()):
        if name.startswith("kvarn.core.") and getattr(module, "launch", None) is original:
            monkeypatch.setattr(module, "launch", note)
    return found


def variant_of(kernel: Any, args: tuple[object, ...], named: dict[str, object]) -> tuple[object, ...]:
    """Return what Triton's choice of code depends on."""
    told = kernel.kwargs
    unspecialised = set(told.get("do_not_specialize") or ())
    unaligned = unspecialised | set(told.get("do_not_specialize_on_alignment") or ())
    kinds: list[object] = []
    for name, value in zip(kernel.arg_names, args, strict=False):
        if isinstance(value, torch.Tensor):
            kinds.append((name, value.dtype, name not in unaligned and value.data_ptr() % 16 == 0))
        elif type(value) is int and name not in unspecialised:
            kinds.append((name, value == 1, value % 16 == 0))
        else:
            kinds.append((name, type(value)))
    return kernel.fn.__name__, *kinds, *sorted((name, str(value)) for name, value in named.items())


def steps(
    config: CacheConfig[Any], group: int, columns: int, flash: Any, token_numbers: int | None = None
) -> Iterator[tuple[str, Step, int]]:
    """Yield steps of many kinds, with what they are called and how many rows they have."""

    def state(requests: int) -> TailState:
        return TailState(config, requests + 1, 400, requests, CPU)

    for requests, each in itertools.product((1, 40, 200), range(1, config.draft_tokens + 2)):
        rows, lengths = ints([*range(1, requests + 1)]), ints([700] * requests)
        table = torch.ones(requests, 6, dtype=torch.int32)
        step = verify_step(state(requests), rows, lengths, table, group, each, columns)
        yield f"{each} rows of {requests}", step, requests * each
    for cases, room in ((CHUNKS, None), (PIECES, TILE)):
        for name, (prefixes, new) in cases.items():
            plan = plan_prefill(config, flash, DTYPE, prefixes, new, CPU, token_numbers, room=room)
            ends = [a + b for a, b in zip(prefixes, new, strict=True)]
            table = torch.ones(len(ends), -(-max(ends) // TILE), dtype=torch.int32)
            rows = ints([*range(1, len(ends) + 1)])
            for tags in (torch.zeros(len(ends), 2, dtype=torch.int64), None):
                step, _ = chunk_step(
                    state(len(ends)), rows, ints(prefixes), ints(ends), tags, table, group, sum(new), plan, columns
                )
            yield name, step, sum(new)


def news(launched: Variants, warm: Variants) -> list[str]:
    """Return the kernels that were launched in variants that are new, with what of them is."""
    found = []
    for variant in launched - warm:
        known = [set(other) for other in warm if other[0] == variant[0]]
        new = min((set(variant) - other for other in known), key=len, default={"all of it"})
        found.append(f"{variant[0]}: {new}")
    return found


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=DTYPE)


@pytest.mark.parametrize(
    ("heads", "sinks", "drafts"),
    [(4, False, 0), (4, True, 0), (3, False, 6), (16, False, 2)],
    ids=["plain", "learned sinks", "drafts", "drafts of many heads"],
)
def test_steps_launch_what_warm_up_launched(launched: Variants, heads: int, sinks: bool, drafts: int) -> None:
    layout = TileLayout.of(get_preset("kvarn_k4v2_g128"), HEAD_DIM)
    config = CacheConfig(layout, KV_HEADS, 128, 4, 2 * TILE + drafts, draft_tokens=drafts)
    layer = allocate_layer(config, 2, 2, 1, DTYPE, CPU)
    flash = flash_for(config, DTYPE, CPU, caps_logits=False)
    logits = torch.zeros(heads) if sinks else None
    warm_up(layer, heads, flash, logits)
    warm = set(launched)
    for name, step, tokens in steps(config, heads // KV_HEADS, VERIFY_COLUMNS, flash):
        q, k, v = (zeros(tokens, count, HEAD_DIM) for count in (heads, KV_HEADS, KV_HEADS))
        attention(q, k, v, layer, step, scale=1.0, sink_logits=logits)
        assert news(launched, warm) == [], name


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8, 16])
def test_warm_up_shares_and_merges_work_as_any_batch_does(launched, monkeypatch, kv_heads):
    # as on an H100
    merging = SimpleNamespace(kwargs={}, fn=SimpleNamespace(__name__="combine_parts_kernel"), arg_names=[])
    monkeypatch.setattr(combine_module, "_explicit_kernel", lambda: merging)
    monkeypatch.setattr(
        combine_module, "has_explicit_merging", lambda parts, *_: parts >= combine_module.EXPLICIT_PARTS
    )
    kernel = SimpleNamespace(kwargs={}, fn=SimpleNamespace(__name__="explicit_attend_kernel"), arg_names=[])
    monkeypatch.setattr(attend_module, "_attend_kernel", lambda *_: kernel)
    monkeypatch.setattr(explicit, "has_explicit_layouts", lambda *_: True)
    monkeypatch.setattr(attend_module, "sm_count", lambda _: 132)
    layout = TileLayout.of(get_preset("kvarn_k4v2_g128"), 128)
    config = CacheConfig(layout, kv_heads, 128, 4, 2 * TILE + 4, draft_tokens=4)
    layer = allocate_layer(config, 2, 2, 1, DTYPE, CPU)
    warm_up(layer, 8 * kv_heads, None)
    warm = set(launched)
    assert ("combine_parts_kernel" in {variant[0] for variant in warm}) == (kv_heads <= 2)
    for requests, each in itertools.product(range(1, 150), (1, 2, 4, 5)):
        state = TailState(config, requests + 1, 400, requests, CPU)
        rows, lengths = ints([*range(1, requests + 1)]), ints([700] * requests)
        step = verify_step(state, rows, lengths, torch.ones(requests, 6, dtype=torch.int32), 8, each)
        attention(*(zeros(requests * each, n * kv_heads, 128) for n in (8, 1, 1)), layer, step, scale=1.0)
        assert news(launched, warm) == [], (requests, each)


def test_steps_over_latents_launch_what_warm_up_launched(launched: Variants) -> None:
    layout = LatentLayout.of(get_preset("kvarn_k4v2_g128"), 128, 32)
    config = CacheConfig(layout, 1, 128, 4, 256)
    heads = ExpandedHeads(HEADS, 64 + layout.rope_dim, 64)
    layer = allocate_layer(config, 2, 2, 1, DTYPE, CPU)
    flash = heads.flash(config, layer.tails, None)
    warm_up_latents(layer, heads, flash)
    warm = set(launched)
    made = HEADS * (64 + 64)
    shape = latent_shape(layout, HEADS, torch.device(CPU))
    for name, step, tokens in steps(config, *shape, flash, heads.token_numbers(layout)):
        rows = LatentRows(zeros(tokens, layout.latent_dim), zeros(tokens, layout.rope_dim))
        if step.plan is None:
            q = (zeros(tokens, HEADS, width) for width in (layout.latent_dim, layout.rope_dim))
            latent_attention(*q, rows, layer, step, 1.0)
        elif not step.plan.short_tokens:
            q = zeros(tokens, HEADS, heads.key_width)
            expanded_attention(q, rows, layer, step, step.plan, heads, lambda x: zeros(x.shape[0], made), 1.0)
        assert news(launched, warm) == [], name
