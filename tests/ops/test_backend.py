"""Memory figures of devices, and the wait before memory is freed."""

import threading
import types

import psutil
import pytest
import torch

from spillway.ops.device import backend as backends
from spillway.ops.device.backend import Backend, backend_for

OTHER = torch.device("privateuseone", 0)


@pytest.fixture
def module(monkeypatch):
    """Torch's module of a device type that this machine lacks."""
    module = types.SimpleNamespace(mem_get_info=lambda device: (3000, 8000))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return module


def test_a_device_is_asked_through_torchs_module_for_it(module):
    assert Backend(OTHER).memory() == (3000, 8000)


def test_what_torchs_allocator_holds_idle_counts_as_free(module):
    module.memory_reserved, module.memory_allocated = lambda device: 900, lambda device: 400
    assert Backend(OTHER).memory() == (3500, 8000)


def test_whoever_knows_better_is_asked_first(module):
    assert Backend(OTHER, lambda device: (5, 6)).memory() == (5, 6)


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_devices_that_share_the_hosts_memory_have_its_figures(module, kind, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    backend = backend_for(torch.device(kind), lambda device: (5, 6))
    assert backend.memory()[1] == psutil.virtual_memory().total


def test_a_device_that_nobody_knows_has_the_hosts_figures(module):
    del module.mem_get_info
    assert Backend(OTHER).memory()[1] == psutil.virtual_memory().total


def test_backend_for_hands_the_figures_on(module, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert backend_for(OTHER, lambda device: (5, 6)).memory() == (5, 6)


def test_settling_waits_on_the_device_in_the_thread_that_frees():
    class Device(backends.Backend):
        def __init__(self):
            super().__init__(torch.device("cpu"))
            self.here, self.waits = threading.local(), []

        def current(self):
            class Current:
                def __enter__(_):
                    self.here.current = True

                def __exit__(_, *error):
                    self.here.current = False

            return Current()

        def synchronize(self):
            self.waits.append(getattr(self.here, "current", False))
            raise RuntimeError("simulated: the device does not answer")  # what can be freed is freed all the same

    device = Device()
    thread = threading.Thread(target=device.settle)
    thread.start(), thread.join()
    assert device.waits == [True]
