"""The count of attention's work: the kernel's is the reference's, and equal shares of it are what programs get."""

import pytest
import torch
from cases import make_case

from kvarn.core import attend as attend_module
from kvarn.core import explicit
from kvarn.core.attend import launch_shape, num_programs
from kvarn.core.step import Step
from kvarn.core.work import RAW_BLOCK, Tasks, count_work, count_work_reference


def tasks_of(step: Step, device: str) -> Tasks:
    """Return what a step's work is counted by, on a device."""
    values = (getattr(step, name) for name in Tasks._fields)
    return Tasks(*(value.to(device) if isinstance(value, torch.Tensor) else value for value in values))


@pytest.mark.parametrize("mode", ["", "canonical", "batch_invariant"])
@pytest.mark.parametrize(
    ("lengths", "new", "hits"),
    [([700, 1, 128], [1, 1, 1], None), ([700, 0, 128], [70, 5, 1], None), ([256, 200], [300, 1], [256, 128])],
)
def test_kernel_counts_as_the_reference(lengths, new, hits, mode, device):
    options = {mode: True} if mode else {}
    if mode == "canonical":
        options |= {"tail": 0, "sink": 0}
    case = make_case(lengths, new, hits=hits, **options)
    ours = count_work(case.layer.config, tasks_of(case.step, device))
    theirs = count_work_reference(case.layer.config, tasks_of(case.step, "cpu"))
    assert torch.equal(ours.cpu(), theirs)


def test_units_are_tiles_and_blocks_of_raw_rows():
    step = make_case([1000, 40], [1, 1], tail=128).step
    # 1,001 tokens: 6 tiles ended 128 tokens before the last, 233 rows are raw; 41 tokens: all raw; and the task's end
    assert step.work_end.diff(prepend=torch.zeros(1)).tolist() == [
        6 + -(-233 // RAW_BLOCK) + 1,
        -(-41 // RAW_BLOCK) + 1,
    ]


def test_tasks_of_no_request_have_no_units():
    step = make_case([300, 10], [40, 3]).step
    padding = step.task_request < 0
    assert padding.any()
    assert (step.work_end.diff()[padding[1:]] == 0).all()
    assert int(step.work_end[-1]) == int(step.work_end[~padding][-1])


def test_where_little_is_read_fewer_programs_share_it(monkeypatch):
    monkeypatch.setattr(attend_module, "sm_count", lambda _: 132)
    monkeypatch.setattr(explicit, "has_explicit_layouts", lambda *_: True)
    device = torch.device("cpu")

    def programs(kv_heads: int, tasks: int, columns: int = 8) -> int:
        config = make_case([300], [1], kv_heads=kv_heads).layer.config
        shape = launch_shape(config, columns, 1, tasks, device)
        return num_programs(config, shape, tasks, 8, True, device)

    # of one task 64 parts are merged at a time
    assert [programs(8, tasks) for tasks in (1, 2, 3, 64)] == [64, 66, 99, 99]
    assert [programs(2, tasks) for tasks in (1, 2, 3, 8, 9)] == [128, 128, 264, 264, 396]
    # two of wide tasks run on each of 132 multiprocessors, whatever their number
    assert [programs(8, tasks, columns=32) for tasks in (1, 64)] == [33, 33]


def test_programs_of_which_few_run_at_once_keep_others_away(monkeypatch):
    monkeypatch.setattr(explicit, "has_explicit_layouts", lambda *_: True)
    config = make_case([300], [1], kv_heads=8).layer.config
    invariant = make_case([300], [1], kv_heads=8, batch_invariant=True).layer.config
    device = torch.device("cpu")
    few = launch_shape(config, 8, 1, 1, device)
    assert few.programs_per_sm * (few.room_kib + 1) <= 228 < (few.programs_per_sm + 1) * (few.room_kib + 1)
    assert launch_shape(config, 8, 1, 64, device).room_kib == 0
    assert launch_shape(invariant, 8, 1, 1, device) == launch_shape(config, 8, 1, 64, device)
