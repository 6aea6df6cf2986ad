"""Tests that need a device with memory of its own. They run on the fake one: `python dev.py test --only device`."""

import gc

import pytest

from fake_device.device import start, wanted
from kit.comfyui.on_device import comfyuis_dynamic_models

collect_ignore_glob = [] if wanted() else ["test_*.py"]
CAPACITY = 8 << 30


@pytest.fixture(autouse=True)
def beside_comfyuis_dynamic_models():
    """Where dynamic VRAM is on, ComfyUI's own models are dynamic too and take turns with ours."""
    with comfyuis_dynamic_models():
        yield


@pytest.fixture
def card():
    """The fake devices, empty. Afterwards no copy may have come too late."""
    import comfy.model_management as mm

    mm.unload_all_models()
    gc.collect()
    device = start(capacity=CAPACITY)
    device.reset()
    device.drop_cached()
    yield device
    mm.unload_all_models()
    gc.collect()
    hazards = device.hazards()
    device.reset()
    for number in range(device.count):
        device.set(number, capacity=CAPACITY)
    assert not hazards, hazards
