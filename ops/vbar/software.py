"""A VBAR on ordinary torch allocations with a byte budget, for every device that comfy-aimdo does not serve."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..device.backend import Backend
from ..ram import available
from . import cap
from .protocol import lock

_serials = itertools.count(1)
_ranks = itertools.count(1)
# Seconds between two reads of the free memory, each of which costs tens of microseconds.
POLL_SECONDS = 0.05
# Faults between two looks at whether the computation has eaten into the headroom.
LOOK_EVERY = 64


class DeviceMemory:
    """The VBARs of one device, and the memory that is free beside them."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        # Weak: a model that is dropped without being closed takes its memory with it.
        self.open: weakref.WeakSet[SoftwareVBAR] = weakref.WeakSet()
        self._free = 0
        self._polled = -POLL_SECONDS

    @property
    def vbars(self) -> list[SoftwareVBAR]:
        """Return the open VBARs, lowest priority first."""
        return sorted(self.open, key=lambda vbar: vbar.rank)

    def free(self) -> int:
        """Return the free bytes of the device, at most POLL_SECONDS old, less the bytes granted since."""
        now = time.monotonic()
        if now - self._polled >= POLL_SECONDS:
            self._free, _ = self.backend.memory()
            self._polled = now
        return self._free

    def took(self, nbytes: int) -> None:
        """Note an allocation (negative: a release) until the next poll sees it."""
        self._free -= nbytes


_devices: dict[torch.device, DeviceMemory] = {}


def memory_of(backend: Backend) -> DeviceMemory:
    """Return the memory of a backend's device. A simulated device has its own."""
    memory = _devices.get(backend.device)
    if memory is None or type(memory.backend.unwrapped) is not type(backend.unwrapped):
        memory = _devices[backend.device] = DeviceMemory(backend)
    return memory


@dataclass(eq=False)
class SoftwareSlice:
    """An allocation. offset, nbytes: its place in the address order, in bytes. memory: uint8, while resident."""

    offset: int
    nbytes: int
    on_evict: Callable[[], None] | None = None
    serial: int = 0  # 0: not resident
    pins: int = 0
    memory: torch.Tensor | None = field(default=None, repr=False)


class SoftwareVBAR:
    """A byte-granular VBAR: every slice is a torch allocation of its own, allocated when `tensor` first asks for it.

    headroom: bytes to keep free on the device for computation.
    """

    kind = "software"
    unit = 1
    failure: str | None = None  # an allocation that fails is raised instead
    follows_free_memory = False

    def __init__(self, backend: Backend, headroom: int = 0) -> None:
        self.backend = backend
        self.headroom = headroom
        self.device_memory = memory_of(backend)
        self.slices: list[SoftwareSlice] = []
        self.top = 0
        self.limit: int | None = None
        self.watermark = 0
        self.used = 0
        self.peak = 0
        self._faults = 0
        self._gave_way = 0
        self.rank = next(_ranks)  # the VBAR of lower rank is evicted from first
        with lock:
            self.device_memory.open.add(self)
            cap.opened(self)

    def alloc(self, nbytes: int, on_evict: Callable[[], None] | None = None) -> SoftwareSlice:
        vbar_slice = SoftwareSlice(self.top, nbytes, on_evict)
        self.slices.append(vbar_slice)
        self.top += nbytes
        self.watermark = self._ceiling()
        return vbar_slice

    def _ceiling(self) -> int:
        # A slice above the limit would be brought only to be evicted by a slice below.
        return self.top if self.limit is None else min(self.top, self.limit)

    def fault(self, vbar_slice: SoftwareSlice | None) -> int | None:
        if vbar_slice is None:
            return None
        with lock:
            self._faults += 1
            if self._faults % LOOK_EVERY == 0:
                self._give_way()
            if vbar_slice.serial:
                vbar_slice.pins += 1
                return vbar_slice.serial
            if vbar_slice.offset + vbar_slice.nbytes > self.watermark or not self._make_room(vbar_slice):
                return None
            vbar_slice.serial = next(_serials)
            vbar_slice.pins = 1
            self.used += vbar_slice.nbytes
            self.peak = max(self.peak, self.used)
            self.device_memory.took(vbar_slice.nbytes)
            return vbar_slice.serial

    def _give_way(self) -> None:
        """Evict where the computation has eaten into the headroom, before an allocation of it would fail."""
        before = self.used
        while self.device_memory.free() < self.headroom and (self._evict_lower_priority() or self._evict_top()):
            pass
        self._gave_way += before - self.used

    def _make_room(self, vbar_slice: SoftwareSlice) -> bool:
        while self._is_above_limit(vbar_slice) or not cap.make_room(self, vbar_slice.nbytes):
            if not self._evict_top(above=vbar_slice.offset):
                self.watermark = vbar_slice.offset
                return False
        while self.device_memory.free() < vbar_slice.nbytes + self.headroom:
            if not self._evict_lower_priority() and not self._evict_top(above=vbar_slice.offset):
                self.watermark = vbar_slice.offset
                return False
        return True

    def _is_above_limit(self, vbar_slice: SoftwareSlice) -> bool:
        return self.limit is not None and self.used + vbar_slice.nbytes > self.limit

    def _evict_lower_priority(self) -> bool:
        for vbar in self.device_memory.vbars:
            if vbar is self:
                return False
            if vbar._evict_top():
                return True
        return False

    def _evict_top(self, above: int = -1) -> bool:
        for vbar_slice in reversed(self.slices):
            if vbar_slice.offset <= above:
                return False
            if vbar_slice.serial and not vbar_slice.pins:
                self._evict(vbar_slice)
                self.watermark = min(self.watermark, vbar_slice.offset)
                return True
        return False

    def _evict(self, vbar_slice: SoftwareSlice) -> None:
        vbar_slice.serial = 0
        vbar_slice.memory = None
        self.used -= vbar_slice.nbytes
        self.device_memory.took(-vbar_slice.nbytes)
        if vbar_slice.on_evict is not None:
            vbar_slice.on_evict()

    def same(self, signature: int, other: int | None) -> bool:
        return signature == other

    def unpin(self, vbar_slice: SoftwareSlice) -> None:
        with lock:
            vbar_slice.pins -= 1
            if self.limit is not None and self.used > self.limit:  # it was lowered while the slice was lent
                self._keep_limit()

    def tensor(self, vbar_slice: SoftwareSlice) -> torch.Tensor:
        if vbar_slice.memory is None:
            vbar_slice.memory = self.backend.lasting(vbar_slice.nbytes)
        return vbar_slice.memory

    def adopt(self, vbar_slice: SoftwareSlice, other: Any, other_slice: SoftwareSlice, signature: int) -> int | None:
        with lock:
            fits = vbar_slice.offset + vbar_slice.nbytes <= self._ceiling()
            same = isinstance(other, SoftwareVBAR) and other_slice.serial == signature
            if not fits or not same or other_slice.pins or other_slice.nbytes != vbar_slice.nbytes:
                return None
            vbar_slice.memory, other_slice.memory = other_slice.memory, None
            vbar_slice.serial, other_slice.serial = next(_serials), 0
            self.used += vbar_slice.nbytes
            self.peak = max(self.peak, self.used)
            other.used -= vbar_slice.nbytes
            return vbar_slice.serial

    def drop_tensor(self, vbar_slice: SoftwareSlice) -> None:
        vbar_slice.memory = None

    def prioritize(self) -> None:
        with lock:
            self.rank = next(_ranks)
            self.watermark = self._ceiling()

    def deprioritize(self) -> None:
        with lock:
            self.rank = -next(_ranks)

    def set_limit(self, nbytes: int | None) -> None:
        with lock:
            self.limit = nbytes
            self.watermark = self._ceiling()
            self._keep_limit()

    def _keep_limit(self) -> None:
        while self.limit is not None and self.used > self.limit and self._evict_top():
            pass

    def free_memory(self, nbytes: int) -> int:
        with lock:
            before = self.used
            while before - self.used < nbytes and self._evict_top():
                pass
            return before - self.used

    def loaded_size(self) -> int:
        return self.used

    def within_reach(self) -> int:
        free, _ = self.backend.memory()
        with lock:
            below = sum(vbar.taken() for vbar in self.device_memory.vbars if vbar.rank < self.rank)
            return self.taken() + free + below

    def taken(self) -> int:
        """Count the bytes that would be free without this VBAR. Weights that lie in their file may count as free."""
        if not self.backend.in_place or not available.COUNTS_MAPPED_FILES:
            return self.used
        return sum(one.nbytes for one in self.slices if one.memory is not None)

    def claim(self, nbytes: int, to_come: int = 0) -> None:
        with lock:
            cap.make_room(self, to_come)
            while self.device_memory.free() < nbytes and self._evict_lower_priority():
                pass

    def gave_way(self) -> int:
        gone, self._gave_way = self._gave_way, 0
        return gone

    def peak_size(self) -> int:
        return self.peak

    def resident(self, vbar_slice: SoftwareSlice | None) -> bool:
        return vbar_slice is not None and bool(vbar_slice.serial)

    def close(self) -> None:
        with lock:
            for vbar_slice in self.slices:
                if vbar_slice.serial:
                    vbar_slice.pins = 0
                    self._evict(vbar_slice)
            self.slices.clear()
            self.device_memory.open.discard(self)
            cap.closed(self)
