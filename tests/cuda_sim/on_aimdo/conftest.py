"""Tests for a process of its own for each comfy-aimdo release; ../test_aimdo.py starts those."""

import gc

import pytest

from cuda_sim.aimdo import HEADROOM, PAGE, load_aimdo, version_under_test
from cuda_sim.aimdo_device import AimdoDevice

collect_ignore_glob = [] if version_under_test() else ["test_*.py"]

# What is there by now stays: the collections between tests need not look at all of torch again.
gc.freeze()

# As in vbar_devices.py: far more than any test uses.
TOTAL = 64 << 30


class Machine:
    """comfy-aimdo, and devices on it with little memory."""

    def __init__(self):
        self.aimdo = load_aimdo(version_under_test(), TOTAL)
        self.driver = self.aimdo.driver
        self.devices = []
        self.driver.reset()
        self.forget_losses()
        self.leave_pages(100)

    def make_device(self, deferred=True, served=True):
        """served: comfy-aimdo knows it."""
        self.devices.append(AimdoDevice(self.driver, self.aimdo if served else None, deferred=deferred))
        return self.devices[-1]

    def leave_pages(self, pages):
        """Other processes take all but so many pages beside what is allocated now, and what comfy-aimdo keeps free."""
        held = self.driver.get("allocated") + self.before.get("mapped", 0)
        self.aimdo.others_take(TOTAL - HEADROOM - pages * PAGE - held)

    def clean(self):
        """Drop what only cycles and the devices' caches hold."""
        gc.collect()
        for device in self.devices:
            device.drop_cached()

    def left_behind(self):
        """What is there now and was not at the beginning, in bytes or pieces."""
        return {name: value - self.before.get(name, 0) for name, value in self.driver.leaks().items()}

    def forget_losses(self):
        """What is there now was there at the beginning."""
        self.before = self.driver.leaks()

    def check_after(self):
        self.clean()
        left = {name: value for name, value in self.left_behind().items() if value}
        assert not left, f"left behind: {left}"
        assert not self.driver.get("illegal"), "memory was used that was not there, or not locked any more"
        assert not self.aimdo.unlocked, self.aimdo.unlocked.pop()


@pytest.fixture
def machine():
    """Afterwards nothing may be left of what a test used."""
    machine = Machine()
    yield machine
    machine.driver.no_faults()
    machine.check_after()


@pytest.fixture(params=[True, False], ids=["deferred", "eager"])
def device(machine, request):
    return machine.make_device(request.param)
