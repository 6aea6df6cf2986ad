"""A VBAR on plain torch allocations with a byte budget, for every device that comfy-aimdo does not serve."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..device.backend import Backend
from .protocol import lock

_serials = itertools.count(1)
_ranks = itertools.count(1)
# Reading the system's free memory costs tens of microseconds.
POLL_SECONDS = 0.05
# Faults between two looks at whether the computation has eaten into the headroom.
LOOK_EVERY = 64


class DeviceBooks:
    """The VBARs of one device, and what is free there beside them."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        # Weak: a model that is dropped without being closed takes its memory with it.
        self.open: weakref.WeakSet[SoftwareVBAR] = weakref.WeakSet()
        self._free = 0
        self._polled = -POLL_SECONDS

    @property
    def vbars(self) -> list[SoftwareVBAR]:
        """The open VBARs, lowest priority first."""
        return sorted(self.open, key=lambda vbar: vbar.rank)

    def free(self) -> int:
        """Free bytes of the device, at most POLL_SECONDS old, less what was granted since."""
        now = time.monotonic()
        if now - self._polled >= POLL_SECONDS:
            self._free, _ = self.backend.memory()
            self._polled = now
        return self._free

    def took(self, nbytes: int) -> None:
        """Note an allocation (negative: a release) until the next poll sees it."""
        self._free -= nbytes


_books: dict[torch.device, DeviceBooks] = {}


def books_for(backend: Backend) -> DeviceBooks:
    """The books of a backend's device; a simulated device has its own."""
    books = _books.get(backend.device)
    if books is None or type(books.backend.plain) is not type(backend.plain):
        books = _books[backend.device] = DeviceBooks(backend)
    return books


@dataclass(eq=False)
class SoftwareSlice:
    """One allocation: its place in the address order, and its memory while resident."""

    offset: int
    nbytes: int
    on_evict: Callable[[], None] | None = None
    serial: int = 0  # 0: not resident
    pins: int = 0
    memory: torch.Tensor | None = field(default=None, repr=False)


class SoftwareVBAR:
    """Byte-granular: every slice is its own allocation, made when its memory is first asked for.

    headroom: bytes to keep free on the device for computation.
    """

    kind = "software"
    failure: str | None = None  # what fails here is an allocation, which is raised

    def __init__(self, backend: Backend, headroom: int = 0) -> None:
        self.backend = backend
        self.headroom = headroom
        self.books = books_for(backend)
        self.slices: list[SoftwareSlice] = []
        self.top = 0
        self.limit: int | None = None
        self.watermark = 0
        self.used = 0
        self.peak = 0
        self._faults = 0
        self.rank = next(_ranks)  # of two VBARs the one of lower rank is evicted from first
        with lock:
            self.books.open.add(self)

    def alloc(self, nbytes: int, on_evict: Callable[[], None] | None = None) -> SoftwareSlice:
        piece = SoftwareSlice(self.top, nbytes, on_evict)
        self.slices.append(piece)
        self.top += nbytes
        self.watermark = self._ceiling()
        return piece

    def _ceiling(self) -> int:
        # What lies above the limit would be brought only to be evicted by what lies below it.
        return self.top if self.limit is None else min(self.top, self.limit)

    def fault(self, piece: SoftwareSlice | None) -> int | None:
        if piece is None:
            return None
        with lock:
            self._faults += 1
            if self._faults % LOOK_EVERY == 0:
                self._give_way()
            if piece.serial:
                piece.pins += 1
                return piece.serial
            if piece.offset + piece.nbytes > self.watermark or not self._make_room(piece):
                return None
            piece.serial = next(_serials)
            piece.pins = 1
            self.used += piece.nbytes
            self.peak = max(self.peak, self.used)
            self.books.took(piece.nbytes)
            return piece.serial

    def _give_way(self) -> None:
        """Evict before an allocation of the computation would fail: it has eaten into the headroom."""
        while self.books.free() < self.headroom and (self._evict_lower_priority() or self._evict_top()):
            pass

    def _make_room(self, piece: SoftwareSlice) -> bool:
        while self.limit is not None and self.used + piece.nbytes > self.limit:
            if not self._evict_top(above=piece.offset):
                self.watermark = piece.offset
                return False
        while self.books.free() < piece.nbytes + self.headroom:
            if not self._evict_lower_priority() and not self._evict_top(above=piece.offset):
                self.watermark = piece.offset
                return False
        return True

    def _evict_lower_priority(self) -> bool:
        for vbar in self.books.vbars:
            if vbar is self:
                return False
            if vbar._evict_top():
                return True
        return False

    def _evict_top(self, above: int = -1) -> bool:
        for piece in reversed(self.slices):
            if piece.offset <= above:
                return False
            if piece.serial and not piece.pins:
                self._evict(piece)
                self.watermark = min(self.watermark, piece.offset)
                return True
        return False

    def _evict(self, piece: SoftwareSlice) -> None:
        piece.serial = 0
        piece.memory = None
        self.used -= piece.nbytes
        self.books.took(-piece.nbytes)
        if piece.on_evict is not None:
            piece.on_evict()

    def same(self, signature: int, other: int | None) -> bool:
        return signature == other

    def unpin(self, piece: SoftwareSlice) -> None:
        with lock:
            piece.pins -= 1
            self._keep_limit()  # it may have been lowered while the slice was lent

    def tensor(self, piece: SoftwareSlice) -> torch.Tensor:
        if piece.memory is None:
            piece.memory = self.backend.empty(piece.nbytes)
        return piece.memory

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

    def held_below(self) -> int:
        """Bytes that the device's VBARs of lower priority hold."""
        with lock:
            return sum(vbar.used for vbar in self.books.vbars if vbar.rank < self.rank)

    def loaded_size(self) -> int:
        return self.used

    def peak_size(self) -> int:
        return self.peak

    def resident(self, piece: SoftwareSlice | None) -> bool:
        return piece is not None and bool(piece.serial)

    def close(self) -> None:
        with lock:
            for piece in self.slices:
                if piece.serial:
                    piece.pins = 0
                    self._evict(piece)
            self.slices.clear()
            self.books.open.discard(self)
