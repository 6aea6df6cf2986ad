"""Checks that a VBAR's slices keep their bytes, and that an evicted one says so and can be filled again."""

from __future__ import annotations

from typing import Any

import torch

from ...ops.device.backend import Backend
from ...ops.errors import SpillwayError
from ...ops.vbar.protocol import VBAR
from .bytes import Load, Wrong, compare, pattern
from .transfers import HostEmpty

# Parts of a page (`unit`), so that slices share one, span two, and end inside one: two and a bit in all.
SHARES = (1 / 32, 1, 1 / 4, 1 / 2, 1 / 4, 1 / 8)
# Only so many bytes at the start, in the middle and at the end of a slice are written and read.
WINDOW = 1 << 15
ALIGNMENT = 512
SPOILT = 8 << 20


class NoRoom(SpillwayError, Exception):
    """Says that the device has no room for the check at the moment."""


def bytes_needed(unit: int) -> int:
    """Count the bytes of a VBAR that can be checked."""
    return sum(_slice_bytes(share, unit) + ALIGNMENT for share in SHARES)


def _slice_bytes(share: float, unit: int) -> int:
    return int(share * unit) // ALIGNMENT * ALIGNMENT + ALIGNMENT


def check_slices(backend: Backend, vbar: VBAR, unit: int, host_empty: HostEmpty, stream: Any) -> None:
    """Raise Wrong where a slice does not hold what was written under its signature. Raise NoRoom where none is granted.

    unit: bytes that are evicted at once. host_empty: makes the host memory of the transfers. stream: a side stream for
    them, or None.
    """
    load = Load(backend)
    slices = [_Slice(backend, vbar, _slice_bytes(share, unit), host_empty, stream, load) for share in SHARES]

    def use_all(what: str, seed: int) -> None:
        for index, piece in enumerate(slices):
            piece.use(what, seed + index)

    use_all("a new slice", 0)
    use_all("a slice that stayed", 10)
    vbar.free_memory(1)
    _spoil(backend)
    use_all("a slice beside an evicted one", 20)
    vbar.free_memory(bytes_needed(unit))
    _spoil(backend)
    use_all("a slice that was evicted", 30)
    use_all("a slice that was filled again", 40)


def _spoil(backend: Backend) -> None:
    """Let torch's allocator have some of the memory that was given back, with other bytes in it."""
    backend.empty(SPOILT).fill_(0xA5)


class _Slice:
    """A slice of the VBAR, and what was last written into it."""

    def __init__(
        self, backend: Backend, vbar: VBAR, nbytes: int, host_empty: HostEmpty, stream: Any, load: Load
    ) -> None:
        self.backend, self.vbar, self.stream, self.load = backend, vbar, stream, load
        self.nbytes = nbytes
        self.place = vbar.alloc(nbytes, lambda: None)
        starts = [0] if nbytes <= 3 * WINDOW else [0, nbytes // 2, nbytes - WINDOW]
        self.windows = [slice(start, min(start + WINDOW, nbytes)) for start in starts]
        self.staging = host_empty(min(nbytes, WINDOW))
        self.host = torch.empty(min(nbytes, WINDOW), dtype=torch.uint8)
        self.device = backend.empty(min(nbytes, WINDOW))
        self.signature: Any = None
        self.seed = 0

    def use(self, what: str, seed: int) -> None:
        """Fault the slice, fill it where it says that its bytes are gone, and compare. seed: of the new bytes."""
        resident = self.vbar.resident(self.place)
        self.vbar.prioritize()
        signature = self.vbar.fault(self.place)
        if signature is None:
            raise NoRoom(f"no room for a slice of {self.nbytes} bytes")
        try:
            memory = self.vbar.tensor(self.place)[: self.nbytes]
            if not self.vbar.same(signature, self.signature):
                self.signature, self.seed = signature, seed
                self._fill(memory)
            elif not resident:
                raise Wrong(f"{what}: it was evicted, and its signature says that its bytes are still there")
            self.load.run()
            self._compare(what, memory)
        finally:
            self.vbar.unpin(self.place)

    def _pattern(self, window: slice) -> torch.Tensor:
        return pattern(window.stop - window.start, self.seed + window.start)

    def _fill(self, memory: torch.Tensor) -> None:
        for window in self.windows:
            wanted = self._pattern(window)
            self.staging[: wanted.numel()].copy_(wanted)
            # Without this wait the copy would overwrite what kernels on the main stream still use this memory for.
            self.backend.wait(self.backend.record(None), self.stream)
            self.backend.copy(memory[window], self.staging[: wanted.numel()], self.stream)
            event = self.backend.record(self.stream)
            self.load.run()
            self.backend.wait(event, None)
            if event is not None:
                event.synchronize()  # the staging buffer is filled again

    def _compare(self, what: str, memory: torch.Tensor) -> None:
        for window in self.windows:
            wanted = self._pattern(window)
            count = wanted.numel()
            self.device[:count].copy_(memory[window])
            self.backend.copy(self.host[:count], self.device[:count], None)
            self.backend.synchronize()
            compare(what, self.host[:count], wanted)
