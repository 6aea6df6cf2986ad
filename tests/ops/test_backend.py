"""Memory figures of devices, and the waits around memory that is freed and calls that fail."""

import threading
import types

import psutil
import pytest
import torch

from kit.sim_device import SimDevice
from spillway.ops.device import backend as backends
from spillway.ops.device.backend import Backend, DeviceError, backend_for
from spillway.ops.device.careful_backend import CarefulBackend
from spillway.ops.ledger import Ledger

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


class Failing(SimDevice):
    """Raises at the next `failures` copies on side streams, each once it has begun, and `refusals` synchronisations.

    until_idle: copies fail until the device has been synchronised.
    """

    failures = refusals = 0
    until_idle = False

    def copy(self, target, source, stream):
        super().copy(target, source, stream)
        if stream is not None and (self.failures or self.until_idle):
            self.failures = max(0, self.failures - 1)
            raise RuntimeError("simulated: a launch failed")

    def synchronize(self):
        if self.refusals:
            self.refusals -= 1
            raise RuntimeError("simulated: the device does not answer")
        super().synchronize()
        self.until_idle = False

    def is_idle(self):
        return all(stream.done == stream.given for stream in self.all_streams)


@pytest.fixture
def failing():
    device = Failing()
    return device, CarefulBackend(device, Ledger("m"))


def made(device, backend):
    """Memory of the device that nothing uses yet, and bytes to copy there."""
    target = backend.empty(64)
    device.synchronize()
    return target, torch.arange(64, dtype=torch.uint8)


def test_a_call_is_tried_again_once_the_device_is_idle(failing):
    device, backend = failing
    target, source = made(device, backend)
    device.until_idle = True
    backend.copy(target, source, backend.stream())
    assert not backend.synchronous
    device.synchronize()
    assert torch.equal(target, source)


def test_what_was_begun_is_done_before_transfers_are_synchronous(failing):
    device, backend = failing
    target, source = made(device, backend)
    device.failures = 2
    backend.copy(target, source, backend.stream())
    assert backend.synchronous and device.is_idle() and torch.equal(target, source)


def test_a_device_that_was_not_synchronised_is_before_the_next_copy(failing):
    device, backend = failing
    stream, second = backend.stream(), backend.empty(64)
    first, source = made(device, backend)
    backend.copy(first, source, stream)
    device.refusals = 2
    with pytest.raises(DeviceError):
        backend.synchronize()
    assert not device.is_idle()
    backend.copy(second, source, None)
    assert device.is_idle() and torch.equal(first, source) and torch.equal(second, source)
