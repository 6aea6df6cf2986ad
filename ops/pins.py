"""Pins: host memory, page-locked where the device gains from it, that holds a bundle ready for one transfer."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .backend import Backend, Event

if TYPE_CHECKING:
    from .bundle import Bundle


@dataclass(eq=False)
class Pin:
    """A bundle in host memory. version: of the finished form that it holds; None for the bytes of the source."""

    buffer: torch.Tensor
    version: int | None
    ready: Event | None = None  # a write-back that may still be under way
    busy: Event | None = None  # the last transfer out of it


class Pins:
    """The pins of one model under a budget in bytes; the least recently used give way first."""

    def __init__(self, backend: Backend, budget: int) -> None:
        self.backend = backend
        self.budget = budget
        self.used = 0
        self._pins: OrderedDict[Bundle, Pin] = OrderedDict()

    def get(self, bundle: Bundle) -> Pin | None:
        """The pin of a bundle, in whatever form it is."""
        pin = self._pins.get(bundle)
        if pin is not None:
            self._pins.move_to_end(bundle)
        return pin

    def take(self, bundle: Bundle, nbytes: int, version: int | None) -> Pin | None:
        """A new pin for a bundle, replacing its old one; None where the budget has no room for it.

        Access is cyclic, so evicting another bundle's pin would only move the miss: what is pinned stays pinned.
        """
        self.drop(bundle)
        if bundle.place == "disk" or self.used + nbytes > self.budget:
            return None
        pageable = bundle.place == "ram"
        buffer = torch.empty(nbytes, dtype=torch.uint8) if pageable else self.backend.host_empty(nbytes)
        pin = self._pins[bundle] = Pin(buffer, version)
        self.used += nbytes
        return pin

    def drop(self, bundle: Bundle) -> int:
        """Free a bundle's pin; returns its bytes."""
        pin = self._pins.pop(bundle, None)
        if pin is None:
            return 0
        self.used -= pin.buffer.numel()
        for event in (pin.ready, pin.busy):
            if event is not None:
                event.synchronize()  # a transfer may still read it
        return pin.buffer.numel()

    def free(self, nbytes: float) -> int:
        """Free pins, the least recently used first, until that many bytes are free; returns the bytes freed."""
        freed = 0
        while self._pins and freed < nbytes:
            freed += self.drop(next(iter(self._pins)))
        return freed
