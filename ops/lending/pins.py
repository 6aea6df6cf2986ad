"""Pins: host memory, page-locked where the device gains from it, that holds a bundle ready for one transfer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..device.backend import Backend, Event
from .bundle import Bundle
from .pin_blocks import BLOCK_BYTES, Extent, PinBlocks


@dataclass(eq=False)
class Pin:
    """A bundle in host memory. version: of the final form that it holds; None for the bytes of the source."""

    extent: Extent
    version: int | None
    ready: Event | None = None  # a write-back that may still be under way
    busy: Event | None = None  # the last transfer out of it

    @property
    def buffer(self) -> torch.Tensor:
        return self.extent.view


class Pins:
    """The pins of one model under a budget in bytes. bundles: in the order in which they will ask for one.

    room: tells how many bytes of RAM pins may still take, whatever the budget.
    """

    def __init__(
        self,
        backend: Backend,
        budget: int,
        bundles: Sequence[Bundle] = (),
        room: Callable[[], int] = lambda: 1 << 62,
    ) -> None:
        self.backend = backend
        self.budget = budget
        self.room = room
        self.used = 0  # bytes of pins; the blocks that they lie in may hold more
        self.changes = 0  # how often a final form came or went: costs are not what they were
        self._blocks = PinBlocks(backend)
        self._bundles = list(bundles)
        self._position = {bundle: index for index, bundle in enumerate(self._bundles)}
        self._pins: OrderedDict[Bundle, Pin] = OrderedDict()  # the least recently used first

    @property
    def held(self) -> int:
        """Return the bytes of host memory that the pins cost."""
        return self._blocks.nbytes

    def set_budget(self, nbytes: int) -> None:
        """Change the bytes that the pins may hold. Pins above the budget are freed at once."""
        self.budget = nbytes
        self.free(self.held - nbytes)

    def get(self, bundle: Bundle) -> Pin | None:
        """Return the pin of a bundle, in whatever form it is; None where it has none."""
        pin = self._pins.get(bundle)
        if pin is not None:
            self._pins.move_to_end(bundle)
        return pin

    def take(self, bundle: Bundle, nbytes: int, version: int | None) -> Pin | None:
        """Replace a bundle's pin by a new one of `nbytes`. Return None where the budget has no room for it.

        Access is cyclic, so evicting another bundle's pin would only move the miss. Other pins stay, but a final form
        (`version` is set) displaces bytes of the source.
        """
        self.drop(bundle)
        if bundle.offload_to == "disk":
            return None
        if bundle.offload_to == "ram":  # ordinary memory, as the policy asks for
            room = min(self.budget - self.held, self.room()) >= nbytes
            extent = self._blocks.add(torch.empty(nbytes, dtype=torch.uint8), nbytes) if room else None
        else:
            extent = self._blocks.take(nbytes, self._block_bytes(bundle, nbytes), self.budget, self.room)
        if extent is None and version is not None:
            extent = self._displace(nbytes)
        if extent is None:
            return None
        pin = self._pins[bundle] = Pin(extent, version)
        self.used += nbytes
        self.changes += bundle.pin_changed(version)
        return pin

    def _displace(self, nbytes: int) -> Extent | None:
        """Free pins of source bytes, which can be read again, until a final form fits; None where it never does."""
        for bundle in [bundle for bundle, pin in self._pins.items() if pin.version is None]:
            block = self._pins[bundle].extent.block
            self.drop(bundle)
            extent = block.cut(nbytes)
            if extent is not None:
                return extent
        return None

    def _block_bytes(self, bundle: Bundle, nbytes: int) -> int:
        """Return the bytes of a block for this bundle and those that will ask next. It ends where a bundle ends."""
        total = nbytes
        for following in self._bundles[self._position.get(bundle, len(self._bundles)) + 1 :]:
            if following.offload_to in ("disk", "ram") or following in self._pins:
                continue
            more = following.nbytes if following.worth_keeping else min(following.nbytes, following.source_bytes)
            if total + more > BLOCK_BYTES:
                break
            total += more
        return total

    def drop(self, bundle: Bundle) -> int:
        """Free a bundle's pin for other pins to use. Return its bytes."""
        pin = self._pins.pop(bundle, None)
        if pin is None:
            return 0
        nbytes = pin.buffer.numel()
        self.used -= nbytes
        self.changes += bundle.pin_changed(None)
        pin.extent.block.join(pin.extent)
        for event in (pin.ready, pin.busy):
            if event is not None:
                # A transfer may still read it. Without this wait the next pin's bytes would travel in its place.
                event.synchronize()
        return nbytes

    def free(self, nbytes: float) -> int:
        """Give whole blocks back to the system, the least recently used first, until that many bytes are free.

        Returns the bytes freed.
        """
        if nbytes <= 0:
            return 0
        last_use = dict.fromkeys(self._blocks.blocks, -1)
        for age, pin in enumerate(self._pins.values()):
            last_use[pin.extent.block] = age
        freed = 0
        for block in sorted(last_use, key=lambda block: last_use[block]):
            if freed >= nbytes:
                break
            for bundle in [bundle for bundle, pin in self._pins.items() if pin.extent.block is block]:
                self.drop(bundle)
            freed += self._blocks.drop(block)
        return freed
