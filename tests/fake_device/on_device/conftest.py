"""Tests for processes in which torch.cuda is the fake device; ../test_fake_device.py starts those."""

import gc

import pytest

from fake_device.device import VARIABLE, start, wanted

collect_ignore_glob = [] if wanted() else ["test_*.py"]

# What is there by now stays: the collections between tests need not look at all of torch again.
gc.freeze()


@pytest.fixture
def fake():
    """The devices, with side streams whose work waits. Afterwards no copy may have come too late."""
    assert wanted(), f"set {VARIABLE}: the fake device is never started beside tests that do not expect it"
    device = start()
    device.reset()
    yield device
    gc.collect()
    device.driver.call("cuCtxSynchronize")
    hazards = device.hazards()
    device.reset()
    assert not hazards, hazards
