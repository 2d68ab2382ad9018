"""Specialised groups of warps over torch: what would go wrong on a GPU is told."""

import pytest
import torch
from gluon_on_torch import Shared, _Barriers, _turns, _warpgroup_mma, _warpgroup_mma_wait


def barrier(arrivals: int = 1) -> Shared:
    found = Shared.allocate(torch.int64, (1,), None)
    _Barriers.init(found, arrivals)
    return found


def test_groups_hand_numbers_to_each_other_and_back():
    there, back, seen = barrier(), barrier(), []

    def first() -> None:
        for turn in range(3):
            seen.append(turn)
            _Barriers.arrive(there)
            _Barriers.wait(back, turn & 1)

    def second() -> None:
        for turn in range(3):
            _Barriers.wait(there, turn & 1)
            seen.append(-turn)
            _Barriers.arrive(back)

    _turns.run([first, second])
    assert seen == [0, 0, 1, -1, 2, -2]


def test_groups_that_wait_for_one_another_are_told():
    ours, theirs = barrier(), barrier(2)
    with pytest.raises(AssertionError, match="wait for one another"):
        _turns.run([lambda: _Barriers.wait(ours, 0), lambda: _Barriers.wait(theirs, 0)])


def test_what_goes_wrong_in_a_group_is_raised_and_others_end():
    def fails() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        _turns.run([fails, lambda: None])


@pytest.mark.parametrize("waits", [True, False])
def test_running_mma_sees_an_operand_that_is_overwritten(waits):
    a, b = torch.eye(2), Shared(torch.eye(2))

    def group() -> None:
        acc = _warpgroup_mma(a, b, torch.zeros(2, 2), is_async=True)
        if waits:
            acc = _warpgroup_mma_wait(0, deps=[acc])
        b.store(torch.zeros(2, 2))
        acc = _warpgroup_mma_wait(0, deps=[acc])
        assert torch.equal(acc, torch.eye(2)) == waits

    _turns.run([group])
