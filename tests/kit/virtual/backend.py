"""A device on a virtual clock. Its memory is reserved and never touched."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from kit.earlier_devices import forget
from spillway.ops.device.backend import Backend
from spillway.ops.vbar import software as software_vbar

from .clock import TO_DEVICE, TO_HOST, Clock, Stream
from .readers import VirtualReaders


class VirtualEvent:
    """A moment of a stream, known as soon as it is recorded."""

    def __init__(self, clock: Clock, at: float) -> None:
        self.clock, self.at = clock, at

    def synchronize(self) -> None:
        """Let the current thread wait."""
        self.clock.call()
        self.clock.wait_until(self.at)

    def query(self) -> bool:
        """Say whether that moment is in the current thread's past."""
        return self.at <= self.clock.thread.at

    def elapsed(self, later: VirtualEvent) -> float:
        """Return the seconds from this moment to a later one."""
        return later.at - self.at


class VirtualBackend(Backend):
    """capacity: bytes of device memory. readers: threads that read ahead."""

    streams = 2

    def __init__(self, clock: Clock, capacity: int = 1 << 45, readers: int = 4) -> None:
        super().__init__(torch.device("cpu"))
        self.clock, self.capacity = clock, capacity
        self._readers = VirtualReaders(clock, readers)
        self._locked: weakref.WeakSet = weakref.WeakSet()  # storages
        self._own: weakref.WeakSet = weakref.WeakSet()  # storages of the device
        self.all_streams: list[Stream] = []
        forget(self.device)

    def identity(self) -> None:
        return None

    def empty(self, nbytes: int) -> torch.Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8)
        self._own.add(memory.untyped_storage())
        return memory

    def host_empty(self, nbytes: int) -> torch.Tensor:
        self.clock.lock(nbytes)
        memory = torch.empty(nbytes, dtype=torch.uint8)
        self._locked.add(memory.untyped_storage())
        return memory

    @property
    def locked_bytes(self) -> int:
        """Return the bytes of page-locked memory that somebody still holds."""
        return sum(storage.nbytes() for storage in self._locked)

    def stream(self) -> Stream:
        self.all_streams.append(Stream(f"stream {len(self.all_streams) + 1}"))
        return self.all_streams[-1]

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream | None) -> None:
        assert target.numel() == source.numel()
        to_host = target.untyped_storage() not in self._own
        host = target if to_host else source
        pageable = host.untyped_storage() not in self._locked
        start, end = self.clock.transfer(target.numel(), stream, TO_HOST if to_host else TO_DEVICE, pageable)
        if self.clock.hazards is not None and not to_host:
            self.clock.hazards.arrives(target, start, end)

    def record(self, stream: Stream | None) -> VirtualEvent:
        self.clock.call()
        now = self.clock.thread.at
        return VirtualEvent(self.clock, stream.ready(now) if stream else max(self.clock.main.at, now))

    def timer(self, stream: Stream | None) -> VirtualEvent:
        return self.record(stream)

    def seconds_between(self, start: VirtualEvent, end: VirtualEvent) -> float:
        return start.elapsed(end)

    def wait(self, event: VirtualEvent | None, stream: Stream | None) -> None:
        if event is not None:
            self.clock.call()
            waits = stream or self.clock.main
            waits.give(self.clock.thread.at, event.at, self.clock.host.at)

    def synchronize(self) -> None:
        self.clock.wait_until(max(self.clock.main.at, *(stream.end() for stream in self.all_streams), 0.0))

    def readers(self) -> VirtualReaders:
        return self._readers

    def memory(self) -> tuple[int, int]:
        used = sum(vbar.used for vbar in software_vbar.memory_of(self).vbars)
        return self.capacity - used, self.capacity

    def __deepcopy__(self, memo: dict[int, Any]) -> VirtualBackend:
        return self
