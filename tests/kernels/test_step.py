"""The kernels that describe steps against torch: the same steps, and the same state after."""

import copy
import random
from dataclasses import fields

import pytest
import torch
from cases import ints

from kvarn.core.cache import CacheConfig
from kvarn.core.chunk_step import chunk_step, chunk_step_reference
from kvarn.core.explicit import SHARED_COLUMNS, VERIFY_COLUMNS
from kvarn.core.layout import TileLayout
from kvarn.core.prefill_plan import LONG_ROWS, plan_prefill
from kvarn.core.step import Step, decode_step, verify_step, verify_step_reference
from kvarn.core.table_steps import TableSteps, pages_reference
from kvarn.core.tail import TailState
from kvarn.presets import get_preset

G, PAGES_EACH, GROUP = 64, 6, 4
STATE = ("ring_end", "ring_page", "sure_end", "sure_page", "own_start", "page_writer", "page_slot", "free_slots")
STATE += ("free_count", "faults", "owner")


def make_state(requests: int, slots: int, tiles_per_block: int, drafts: int = 0) -> TailState:
    layout = TileLayout.of(get_preset("kvarn_k4v2_g64"), 64)
    config = CacheConfig(
        layout, 1, 64, 4 if slots else 0, 128 + drafts, tiles_per_block=tiles_per_block, draft_tokens=drafts
    )
    return TailState(config, requests + 1, 1 + -(-requests * PAGES_EACH // tiles_per_block), slots, "cpu")


def same(ours: Step, theirs: Step) -> None:
    for field in fields(Step):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert torch.equal(a.cpu(), b) if isinstance(a, torch.Tensor) else a == b, field.name


def same_state(ours: TailState, theirs: TailState) -> None:
    free = int(theirs.free_count)
    for name in STATE:
        a, b = getattr(ours, name).cpu(), getattr(theirs, name)
        if name == "free_slots":  # past the count it holds leftovers
            a, b = a[:free], b[:free]
        assert torch.equal(a, b), name


def moved(state: TailState, device: str) -> TailState:
    other = copy.deepcopy(state)
    for name, value in vars(other).items():
        if isinstance(value, torch.Tensor):
            setattr(other, name, value.to(device))
    return other


def tamper(dice: random.Random, states: list[TailState], lengths: list[int], table: torch.Tensor) -> None:
    """Start a request anew, give it other pages, or lie about a ring, in all states alike."""
    who, tile = dice.randrange(len(lengths)), dice.randrange(PAGES_EACH)
    row, page = dice.randrange(1, len(lengths) + 1), table[who, tile]
    event, drafts = dice.randrange(6), dice.randrange(states[0].config.draft_tokens + 1)
    if event == 0:
        lengths[who] = dice.choice([0, G, 2 * G, 5])
    elif event == 1:
        table[who] = table[who, torch.tensor(dice.sample(range(PAGES_EACH), PAGES_EACH))]
    elif event == 2:
        lengths[who] -= lengths[who] % G
    for state in states:
        if event == 3:
            state.page_writer[int(page)] = row
        elif event == 4:
            state.ring_end[row], state.sure_end[row] = lengths[who] + drafts, lengths[who]
        elif event == 5:
            state.forget(torch.tensor([row], device=state.ring_end.device))


@pytest.mark.parametrize(
    ("requests", "slots", "drafts", "steps"),
    [(1, 1, 0, 80), (7, 3, 0, 80), (7, 0, 0, 80), (40, 40, 0, 80), (7, 3, 5, 60), (7, 3, 63, 20)],
)
@pytest.mark.parametrize("tiles_per_block", [1, 2])
def test_steps_and_state_are_those_of_the_reference(requests, slots, drafts, steps, tiles_per_block, device):
    """Whatever the state says, be it true or not: rings are continued, taken over or lost by the same rule."""
    dice = random.Random(requests)
    state = make_state(requests, slots, tiles_per_block, drafts)
    ours = moved(state, device)
    table = torch.randperm(requests * PAGES_EACH, generator=torch.Generator().manual_seed(0)).int() + tiles_per_block
    table = table.view(requests, PAGES_EACH)
    rows = torch.randperm(requests, generator=torch.Generator().manual_seed(1)).int() + 1
    lengths = [dice.choice([0, 1, G - 2, G - 1, G, 2 * G - 1]) for _ in range(requests)]
    for _ in range(steps):
        for _ in range(dice.randrange(3)):
            tamper(dice, [state, ours], lengths, table)
        at, pages = rows.clone(), table.clone()
        each = 1 + dice.choice([0, drafts, dice.randrange(drafts + 1)])
        before, lengths = lengths, [(length + each) % (PAGES_EACH * G) for length in lengths]
        ends = ints(lengths)
        if dice.random() < 0.5:  # padding of a captured graph, with any length
            who = dice.randrange(requests)
            at[who], ends[who], pages[who] = 0, dice.choice([0, 1, 77]), 0
            lengths[who] = before[who]
        widest = dice.choice([VERIFY_COLUMNS, SHARED_COLUMNS])
        theirs = verify_step_reference(state, at, ends, pages, GROUP, each, widest)
        same(verify_step(ours, at.to(device), ends.to(device), pages.to(device), GROUP, each, widest), theirs)
        same_state(ours, state)
        lengths = [length - min(length, dice.randrange(each)) for length in lengths]
    assert int(state.faults) > 0


@pytest.mark.parametrize(
    ("requests", "slots", "drafts", "steps"), [(1, 1, 0, 40), (7, 3, 0, 40), (7, 0, 5, 30), (30, 40, 0, 20)]
)
@pytest.mark.parametrize("tiles_per_block", [1, 2])
def test_chunks_and_state_are_those_of_the_reference(
    requests, slots, drafts, steps, tiles_per_block, device, monkeypatch
):
    """With names and without, planned and not, in batches that leave requests out and run past the kernel's block."""
    monkeypatch.setattr(f"{chunk_step.__module__}._BLOCK", 16)
    dice = random.Random(requests + drafts)
    state = make_state(requests, slots, tiles_per_block, drafts)
    ours = moved(state, device)
    table = torch.randperm(requests * PAGES_EACH, generator=torch.Generator().manual_seed(0)).int() + tiles_per_block
    table = table.view(requests, PAGES_EACH)
    names = torch.randint(1 << 40, (requests, 2), generator=torch.Generator().manual_seed(1))
    lengths = [dice.choice([0, 1, G - 1, G, 2 * G - 1]) for _ in range(requests)]
    continuing = 0
    for _ in range(steps):
        for _ in range(dice.randrange(3)):
            tamper(dice, [state, ours], lengths, table)
        if dice.random() < 0.3:
            names[dice.randrange(requests)] += 1
        who = torch.tensor(sorted(dice.sample(range(requests), dice.randrange(1, requests + 1))))
        new = [min(dice.choice([1, 3, G, 3 * G - 5]), PAGES_EACH * G - lengths[i]) for i in who]
        new = [max(count, 0) for count in new]
        prefixes = [lengths[i] for i in who]
        ends = [prefix + count for prefix, count in zip(prefixes, new, strict=True)]
        plan = None
        if dice.random() < 0.5:
            plan = plan_prefill(state.config, object(), torch.float16, prefixes, new, torch.device("cpu"))
        tags = names[who] if dice.random() < 0.8 else None
        args = (who.int() + 1, ints(prefixes), ints(ends), tags, table[who])
        step, continued = chunk_step_reference(state, *args, GROUP, sum(new), plan)
        on_device = [x if x is None else x.to(device) for x in args]
        got, got_continued = chunk_step(ours, *on_device, GROUP, sum(new), plan)
        same(got, step)
        same_state(ours, state)
        assert torch.equal(got_continued.cpu(), continued)
        continuing += int(continued.sum())
        for i, end in zip(who.tolist(), ends, strict=True):
            lengths[i] = end if end < PAGES_EACH * G else 0
    assert int(state.faults) > 0
    assert continuing > 0


def test_lengths_may_have_any_integer_type(device):
    state = moved(make_state(2, 1, 1), device)
    args = ([1, 2], [0, 0], [G + 3, LONG_ROWS])
    wide = [torch.tensor(x, device=device) for x in args]
    table = ints([[1, 2], [3, 4]]).to(device)
    step, _ = chunk_step(state, *wide, None, table, GROUP, G + 3 + LONG_ROWS)
    for x, want in zip((step.rows, step.prefix_lens, step.seq_lens), args, strict=True):
        assert (x.dtype, x.tolist()) == (torch.int32, want)


def test_pages_are_those_of_the_table(device):
    state = moved(make_state(3, 0, 1), device)
    slots = torch.randint(1 << 20, (5, 300), dtype=torch.int32)
    rows = torch.tensor([4, 0, 2])
    steps = TableSteps(state, [], slots.to(device), GROUP, None)
    for most in (None, 3, 1):
        want = pages_reference(rows, slots, 5 if most is None else most, G)
        assert torch.equal(steps.pages(rows.to(device), most).cpu(), want)


def test_more_drafts_than_rings_are_wide_for_are_refused():
    state, rows, table = make_state(1, 0, 1, drafts=2), ints([1]), ints([[1]])
    assert verify_step(state, rows, ints([3]), table, GROUP, 3).token_position.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="rings for 3 drafts"):
        verify_step(state, rows, ints([6]), table, GROUP, 4)


def test_a_lost_tile_is_counted(device):
    state = moved(make_state(3, 3, 1), device)
    rows, table = ints([1, 2, 3]).to(device), ints([[1, 2], [3, 4], [5, 6]]).to(device)
    decode_step(state, rows, ints([1, G + 1, 7]).to(device), table, GROUP)
    assert state.faults.tolist() == [1]
