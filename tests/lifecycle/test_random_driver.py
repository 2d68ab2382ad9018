"""Volume: random schedules over small caches, every step checked by the oracle.

KVARN_LIFECYCLE_STEPS (40000) is the number of forward passes over all settings together: four times as many a seed as
any fault of lifecycle_faults.py took to be found.
"""

import os

import pytest
from lifecycle_driver import Driver
from lifecycle_world import DRAFT_EVENTS, EVENTS, SETTINGS, World

STEPS = int(os.environ.get("KVARN_LIFECYCLE_STEPS", "40000"))
SEEDS = (1, 2)
# With less than this many steps a setting, rare events may not come up.
_ENOUGH_STEPS = 2000


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_position_resolves_to_its_own_token_in_random_schedules(name: str) -> None:
    setting = SETTINGS[name]
    steps = STEPS // len(SETTINGS) // len(SEEDS)
    for seed in SEEDS:
        world = World(setting)
        Driver(world, f"{name}, seed {seed}").run(steps)
        world.flush()
        world.check()
        expected = set(EVENTS) if setting.sink else set(EVENTS) - {"sink exhaustion", "sink reads"}
        expected |= set(DRAFT_EVENTS) if setting.drafts else set()
        missing = {event for event in expected if not world.counts[event]}
        assert not missing or steps < _ENOUGH_STEPS
