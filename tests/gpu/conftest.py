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

    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # what libraries keep for good
        made = torch.nn.Linear(64, 64, device=DEVICE, dtype=dtype).requires_grad_(False)
        made(torch.ones(64, 64, device=DEVICE, dtype=dtype)).cpu()
        del made
    before = held()
    yield DEVICE
    assert held() <= before, "device memory was left behind"
