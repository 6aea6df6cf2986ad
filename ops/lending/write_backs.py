"""Final forms on their way back to their pins."""

from __future__ import annotations

from typing import Any

import torch

from ..device.backend import Backend, Event
from .bundle import Bundle
from .pins import Pins


class WriteBacks:
    """Copies of final forms from the device into pins, whose next use then costs a transfer and no computation."""

    def __init__(self, backend: Backend, pins: Pins) -> None:
        self.backend, self.pins = backend, pins
        self.most = 1 << 62  # bytes that may be under way
        # Memory is kept until the stream has read it. Else the allocator would hand it out and the pin would get the
        # numbers of another tensor.
        self._under_way: list[tuple[Event | None, torch.Tensor]] = []

    @property
    def nbytes(self) -> int:
        """Return the bytes of device memory that are kept for them."""
        return sum(memory.numel() for _, memory in self._under_way)

    def begin(self, bundle: Bundle, memory: torch.Tensor, stream: Any) -> bool:
        """Copy the final form in `memory` into a pin. Return False where there is none."""
        pin = self.pins.take(bundle, bundle.nbytes, bundle.version)
        if pin is None:
            return False
        try:
            # The main stream makes the final form. Without this wait the pin would get what lay there before.
            self.backend.wait(self.backend.record(None), stream)
            self.backend.copy(pin.buffer, memory, stream)
            pin.ready = self.backend.record(stream)
        except BaseException:
            self.backend.synchronize()
            self.pins.drop(bundle)  # its version would pass what lies there off as the final form
            raise
        self._under_way.append((pin.ready, memory))
        self.finish(self.nbytes - self.most)
        return True

    def forget_done(self) -> None:
        """Let go of the memory of those that have ended."""
        if self._under_way:
            self._under_way = [
                (event, kept) for event, kept in self._under_way if event is not None and not event.query()
            ]

    def finish(self, nbytes: int = 1 << 62) -> None:
        """Wait for them, the oldest first, until so many bytes are free."""
        left = self.nbytes - nbytes
        while self._under_way and self.nbytes > left:
            event, _ = self._under_way[0]
            if event is not None:
                event.synchronize()
            del self._under_way[0]
