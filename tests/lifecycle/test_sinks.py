"""The map from first pages to sink slots: the kernel does what the reference does, and no slot is lost on the way."""

import random

import pytest
import torch
import triton
import triton.language as tl

from kvarn.core.cache import CacheConfig
from kvarn.core.kernels.sinks import move_sink_slots
from kvarn.core.layout import TileLayout
from kvarn.core.tail import TailState
from kvarn.presets import get_preset

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = 64
PAGES = 40
BLOCK = 1024


@triton.jit
def update_sinks_kernel(
    page_slot_ptr, free_slots_ptr, free_count_ptr, token_position_ptr, token_page_ptr, num_tokens, G: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Do with tokens what kernels that describe steps do. One program."""
    count = tl.load(free_count_ptr)
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        ok = token < num_tokens
        position = tl.load(token_position_ptr + token, mask=ok, other=1)
        page = tl.load(token_page_ptr + token, mask=ok, other=0)
        starts = ok & (position % G == 0) & (page > 0)
        count = move_sink_slots(count, page_slot_ptr, free_slots_ptr, page, starts, position == 0)
    tl.store(free_count_ptr, count)


def fresh_state(slots: int, device: str) -> TailState:
    config = CacheConfig(TileLayout.of(get_preset("kvarn_k4v2_g64"), 64), 1, TILE, 4, 2 * TILE)
    return TailState(config, 4, PAGES, slots, device)


def random_tokens(pick: random.Random, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and pages of one step: chunks of several requests, each page started at most once, some padding."""
    pages = pick.sample(range(1, PAGES), PAGES - 1)
    position: list[int] = []
    page: list[int] = []
    while len(position) < most and len(pages) > 8:
        begin = pick.choice([0, 0, 1, TILE - 1, TILE, 3 * TILE, pick.randrange(5 * TILE)])
        span = range(begin, begin + pick.randrange(1, 3 * TILE))
        own = {tile: pages.pop() for tile in range(span[0] // TILE, span[-1] // TILE + 1)}
        position += span
        page += [own[p // TILE] for p in span]
    padding = pick.randrange(3)
    columns = (position + [0] * padding, page + [0] * padding)
    return tuple(torch.tensor(x, dtype=torch.int32) for x in columns)


def contents(state: TailState) -> tuple[list[int], list[int]]:
    return state.page_slot.tolist(), state.free_slots[: int(state.free_count)].tolist()


@pytest.mark.parametrize("slots", [1, 5, 8])
def test_kernel_keeps_the_map_that_the_reference_keeps(slots: int) -> None:
    pick = random.Random(slots)
    by_kernel, by_reference = fresh_state(slots, DEVICE), fresh_state(slots, "cpu")
    exhausted = given_back = False
    for _ in range(40):
        position, page = random_tokens(pick, pick.choice([1, 60, 1500]))
        held = by_reference.page_slot >= 0
        by_reference.update_sinks(position, page)
        update_sinks_kernel[(1,)](
            by_kernel.page_slot, by_kernel.free_slots, by_kernel.free_count, position.to(DEVICE), page.to(DEVICE),
            position.shape[0], G=TILE, BLOCK=BLOCK,
        )  # fmt: skip
        assert contents(by_kernel) == contents(by_reference)
        by_kernel.check_integrity()
        assert int(by_kernel.page_slot[0]) == -1
        exhausted |= int(by_reference.free_count) == 0
        given_back |= bool((held & (by_reference.page_slot < 0)).any())
    assert given_back
    assert exhausted


def test_page_that_starts_again_at_position_0_keeps_its_slot() -> None:
    state = fresh_state(3, "cpu")
    first = torch.tensor([0], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)
    state.update_sinks(*first)
    slot = int(state.page_slot[7])
    state.update_sinks(*first)
    assert (int(state.page_slot[7]), int(state.free_count)) == (slot, 2)


@pytest.mark.parametrize("harm", ["shared", "leaked"])
def test_integrity_check_notices(harm: str) -> None:
    state = fresh_state(3, "cpu")
    state.update_sinks(torch.tensor([0], dtype=torch.int32), torch.tensor([7], dtype=torch.int32))
    state.page_slot[8 if harm == "shared" else 7] = state.page_slot[7] if harm == "shared" else -1
    with pytest.raises(RuntimeError, match="leaked or shared"):
        state.check_integrity()
