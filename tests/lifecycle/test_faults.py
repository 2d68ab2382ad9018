"""The harness bites: every class of fault is found within a stated number of forward passes, whatever the seed."""

import pytest
from lifecycle_driver import Driver
from lifecycle_faults import FAULTS, Fault
from lifecycle_oracle import Violation
from lifecycle_world import World


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fault_is_found_within_its_steps(fault: Fault, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(fault.setting, fault.config)
    fault.inject(monkeypatch)
    with pytest.raises((Violation, RuntimeError)):
        Driver(world, seed).run(fault.within_steps)
