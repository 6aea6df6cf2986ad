"""The engine on a real device, or on the fake one: only where `dev.py gpu` has named it."""

import gc

import pytest

from kit.device import device_under_test

DEVICE = device_under_test()

collect_ignore_glob = [] if DEVICE is not None else ["test_*.py"]


@pytest.fixture
def device():
    """The device. Afterwards it holds no more tensors than before."""
    import torch

    module = torch.get_device_module(DEVICE)

    def held():
        gc.collect()
        return module.memory_allocated(DEVICE) if hasattr(module, "memory_allocated") else 0

    torch.ones(8, 8, device=DEVICE) @ torch.ones(8, 8, device=DEVICE)  # what libraries keep for good
    before = held()
    yield DEVICE
    assert held() <= before, "device memory was left behind"
