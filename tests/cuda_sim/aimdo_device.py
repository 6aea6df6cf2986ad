"""A device for the engine whose memory, streams and events are the simulated driver's.

Allocations go through the stream-ordered functions that comfy-aimdo hooks and ComfyUI prefers, and are kept for reuse,
as an allocator keeps them. Host memory is registered with the driver. So a missing wait, a refused lock or an injected
fault reaches the engine as it would on a GPU.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import defaultdict, deque
from typing import Any

import torch

from kit.earlier_devices import forget
from kit.sim_device import Hazard
from spillway.ops.device.backend import Backend
from spillway.ops.device.locked_memory import locked

from .aimdo import Aimdo
from .sim import NOT_READY, OUT_OF_MEMORY, POISON, Driver, DriverError, pointer

ALIGNMENT = 512


class Stream:
    """A stream of the driver. saw: how far along the main stream it is known to be."""

    def __init__(self, driver: Driver) -> None:
        self.handle = driver.make("cuStreamCreate", 0, kind=pointer)
        self.given = self.saw = 0
        self.targets: deque[tuple[int, int, int]] = deque()  # (position, address, bytes) of copies to the device
        weakref.finalize(self, driver.result, "cuStreamDestroy_v2", self.handle)

    def arrived(self, position: int) -> list[tuple[int, int]]:
        """(address, bytes) of the copies up to a position, each told once."""
        there = []
        while self.targets and self.targets[0][0] <= position:
            there.append(self.targets.popleft()[1:])
        return there


class Event:
    """An event of the driver, recorded on a stream; None is the main stream."""

    def __init__(self, device: AimdoDevice, stream: Stream | None) -> None:
        self.device, self.stream = device, stream
        self.position = device.clock if stream is None else stream.given
        driver = device.driver
        self.handle = driver.make("cuEventCreate", 2, kind=pointer)
        weakref.finalize(self, driver.result, "cuEventDestroy_v2", self.handle)
        driver.call("cuEventRecord", self.handle, stream and stream.handle)

    def synchronize(self) -> None:
        self.device.driver.call("cuEventSynchronize", self.handle)
        if self.stream is None:
            self.device.host_saw = max(self.device.host_saw, self.position)
        else:
            self.stream.arrived(self.position)

    def query(self) -> bool:
        if self.stream is None:  # done at once here, which the host has to be told
            return self.device.host_saw >= self.position
        code = self.device.driver.result("cuEventQuery", self.handle)
        if code not in (0, NOT_READY):
            raise DriverError("cuEventQuery", code, "simulated")
        return code == 0


class Memory:
    """Makes a tensor of a range of addresses, and says when nobody holds it any more."""

    def __init__(self) -> None:
        self._classes: dict[int, type] = {}

    def tensor(self, address: int, nbytes: int, dropped: Any) -> torch.Tensor:
        cls = self._classes.get(nbytes)
        if cls is None:  # a subclass, since a plain ctypes array takes no weak reference
            cls = self._classes[nbytes] = type("Range", (ctypes.c_uint8 * nbytes,), {})
        view = cls.from_address(address)  # type: ignore[attr-defined]
        weakref.finalize(view, dropped, address, nbytes)
        return torch.frombuffer(view, dtype=torch.uint8)


class AimdoDevice(Backend):
    """deferred: copies take effect when something waits for them; else at once. aimdo None: it does not serve this."""

    streams = 2

    name: str | None = None  # what the check before a first use knows it by; without one there is no check

    def __init__(self, driver: Driver, aimdo: Aimdo | None, *, deferred: bool = True) -> None:
        super().__init__(torch.device("cpu"))
        self.driver = driver
        driver.set(deferred=deferred)
        if aimdo is not None:
            self.aimdo_device = 0
            aimdo.on_tensor = self._use
        forget(self.device)
        self.clock = self.host_saw = (
            0  # of the main stream: how much it has been given, and how much is known to be done
        )
        self.in_use: dict[int, tuple[int, int]] = {}  # device address: (bytes, in use by the main stream until)
        self._memory = Memory()
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._cached: dict[int, list[int]] = defaultdict(list)  # bytes: addresses of blocks that nobody uses
        self._lock = threading.RLock()

    def identity(self) -> str | None:
        return self.name

    # -- memory

    def empty(self, nbytes: int) -> torch.Tensor:
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        with self._lock:
            address = self._cached[size].pop() if self._cached[size] else self._allocate(size)
        ctypes.memset(address, POISON, size)
        self._use(address, size)
        return self._memory.tensor(address, size, self._keep)[:nbytes]

    def _allocate(self, size: int) -> int:
        try:
            return self.driver.make("cuMemAllocAsync", size, None)
        except DriverError as error:
            if error.code != OUT_OF_MEMORY:
                raise
        self.drop_cached()
        try:
            return self.driver.make("cuMemAllocAsync", size, None)
        except DriverError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes (simulated).") from None

    def _keep(self, address: int, size: int) -> None:
        with self._lock:
            self._cached[size].append(address)

    def drop_cached(self) -> None:
        """Give the blocks that nobody uses back to the driver."""
        with self._lock:
            for addresses in self._cached.values():
                while addresses:
                    self.driver.call("cuMemFreeAsync", addresses[-1], None)
                    addresses.pop()

    def host_empty(self, nbytes: int) -> torch.Tensor:
        memory = locked(nbytes, lambda at, size: self.driver.call("cuMemHostRegister_v2", at, size, 0), self._unlock)
        return memory.fill_(POISON)

    def _unlock(self, address: int) -> bool:
        return self.driver.result("cuMemHostUnregister", address) == 0

    def memory(self) -> tuple[int, int]:
        free, total = self.driver.memory()
        with self._lock:
            idle = sum(size * len(addresses) for size, addresses in self._cached.items())
        return free + idle, total

    # -- what the main stream uses

    def _use(self, address: int, nbytes: int) -> None:
        with self._lock:
            self.clock += 1
            self.in_use[address] = (nbytes, self.clock)

    def _check(self, address: int, nbytes: int, stream: Stream) -> None:
        until = max(
            (
                end
                for start, (size, end) in list(self.in_use.items())
                if start < address + nbytes and address < start + size
            ),
            default=0,
        )
        if max(stream.saw, self.host_saw) < until:
            raise Hazard("a side stream overtakes the main stream's use of this memory")

    # -- streams

    def stream(self) -> Stream:
        stream = Stream(self.driver)
        self._streams.add(stream)
        return stream

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream | None) -> None:
        assert target.numel() == source.numel()
        to, start, nbytes = target.data_ptr(), source.data_ptr(), target.numel()
        inward = self.driver.is_device_memory(to, nbytes)
        name = "cuMemcpyHtoD" if inward else "cuMemcpyDtoH"
        if stream is None:
            self.driver.call(f"{name}_v2", to, start, nbytes)
            return
        self._check(to if inward else start, nbytes, stream)
        self.driver.call(f"{name}Async_v2", to, start, nbytes, stream.handle)
        stream.given += 1
        if inward:
            stream.targets.append((stream.given, to, nbytes))

    def record(self, stream: Stream | None) -> Event:
        return Event(self, stream)

    def wait(self, event: Event | None, stream: Stream | None) -> None:
        if event is None or event.stream is stream:
            return
        self.driver.call("cuStreamWaitEvent", stream and stream.handle, event.handle, 0)
        if stream is not None:
            if event.stream is None:
                stream.saw = max(stream.saw, event.position)
            else:
                stream.given += 1
            return
        assert event.stream is not None
        for address, nbytes in event.stream.arrived(event.position):
            self._use(address, nbytes)  # by the main stream, from now on

    def synchronize(self) -> None:
        self.driver.call("cuCtxSynchronize")
        self.host_saw = self.clock
        for stream in list(self._streams):
            stream.arrived(stream.given)  # whether anybody uses it from now on is not known
