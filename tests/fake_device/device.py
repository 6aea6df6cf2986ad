"""Starts the fake device in this process, once, and controls it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cuda_sim import build as driver_build
from cuda_sim.sim import POISON, Driver, load_driver

from . import build

# Set in processes whose torch.cuda is to be the fake device.
VARIABLE = "SPILLWAY_FAKE_CUDA"

SIGNATURES: dict[str, tuple] = {
    "fake_start": (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int),
    "fake_current_device": (ctypes.c_int,),
    "fake_set_device": (None, ctypes.c_int),
    "fake_stream": (ctypes.c_int64, ctypes.c_int),
    "fake_set_stream": (None, ctypes.c_int, ctypes.c_int64),
    "fake_memory": (ctypes.c_int64, ctypes.c_int, ctypes.c_char_p),
    "fake_reset_peak": (None, ctypes.c_int),
    "fake_fail_at": (None, ctypes.c_int, ctypes.c_int64),
    "fake_drop_cached": (None, ctypes.c_int),
    "fake_hazards": (ctypes.c_int64,),
    "fake_pop_hazard": (ctypes.c_char_p,),
    "fake_operators": (ctypes.c_int64,),
    "fake_seed": (None, ctypes.c_int, ctypes.c_uint64),
}


class FakeDevice:
    """The devices of this process: `count` of them, cuda:0 and so on."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.driver: Driver = load_driver()
        self.library = ctypes.CDLL(str(build.device()), mode=ctypes.RTLD_GLOBAL)
        for name, (result, *arguments) in SIGNATURES.items():
            getattr(self.library, name).restype = result
            getattr(self.library, name).argtypes = arguments
        error = self.library.fake_start(str(driver_build.driver()).encode(), count)
        if error:
            raise RuntimeError(f"the fake device does not start: {error.decode()}")

    def memory(self, what: str, device: int = 0) -> int:
        """used, peak, reserved, reserved_peak in bytes; allocations and refused as counts."""
        return int(self.library.fake_memory(device, what.encode()))

    @property
    def operators(self) -> int:
        """How many operators ran."""
        return int(self.library.fake_operators())

    @contextmanager
    def of(self, device: int) -> Iterator[None]:
        """Makes a device the current one."""
        before = self.library.fake_current_device()
        self.library.fake_set_device(device)
        try:
            yield
        finally:
            self.library.fake_set_device(before)

    def set(self, device: int = 0, **settings: int) -> None:
        """capacity, others (bytes that other processes hold) of a device; deferred, pin_limit of all."""
        with self.of(device):
            self.driver.set(**settings)

    def get(self, name: str, device: int = 0) -> int:
        with self.of(device):
            return self.driver.get(name)

    def held(self, device: int = 0) -> int:
        """Bytes of a device that are not free."""
        return self.get("allocated", device) + self.get("mapped", device) + self.get("others", device)

    @contextmanager
    def room(self, nbytes: int, device: int = 0) -> Iterator[None]:
        """Leaves so many bytes beside what is in use, for the length of a block."""
        before = self.get("capacity", device)
        self.library.fake_drop_cached(device)
        self.set(device, capacity=self.held(device) + nbytes)
        try:
            yield
        finally:
            self.set(device, capacity=before)

    def fail_at(self, allocation: int, device: int = 0) -> None:
        """Let the n-th allocation from now raise OutOfMemoryError; 0 for none."""
        self.library.fake_fail_at(device, allocation)

    def hazards(self) -> list[str]:
        """What went wrong on side streams since the last question."""
        return [self.library.fake_pop_hazard().decode() for _ in range(self.library.fake_hazards())]

    def drop_cached(self) -> None:
        """Give the memory that nobody uses back to the driver."""
        for device in range(self.count):
            self.library.fake_drop_cached(device)

    def reset(self) -> None:
        """No faults, no hazards, peaks at what is used now, streams empty, the first device current."""
        self.driver.call("cuCtxSynchronize")
        self.driver.reset()
        self.hazards()
        self.library.fake_set_device(0)
        for device in range(self.count):
            self.fail_at(0, device)
            self.library.fake_reset_peak(device)


def wanted() -> bool:
    """Whether this process is one of those."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


_started: FakeDevice | None = None


def start(count: int = 2, *, capacity: int = 8 << 30, deferred: bool = True) -> FakeDevice:
    """The devices of this process, from now on behind torch.cuda. Raises Unavailable where they cannot be built.

    deferred: what side streams are given takes effect only when something waits for it.
    """
    global _started
    if _started is None:
        _started = FakeDevice(count)
        from . import namespace

        namespace.install(_started)
    _started.driver.set(devices=count, poison=POISON, deferred=deferred)
    for device in range(count):
        _started.set(device, capacity=capacity)
    torch.cuda.set_device(0)
    return _started
