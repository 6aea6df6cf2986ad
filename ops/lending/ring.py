"""Ring buffers: a few reusable buffers that offloaded bundles pass through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..device.backend import Event
from ..ledger import Counters


@dataclass(eq=False)
class Slot:
    """A buffer of a ring. done: event after the last use of its content.

    fresh: just allocated, so kernels queued on the main stream may still use that memory for another tensor.
    """

    buffer: torch.Tensor
    fresh: bool = True
    done: Event | None = None
    taken: bool = False


class Ring:
    """`slots` buffers, grown to the largest bundle that passed through them.

    `take` blocks the launching thread until the slot's last use is done. Without this wait the next transfer would
    overwrite a buffer that a kernel still reads. It also keeps that thread from running ahead by more than the ring.
    """

    def __init__(self, empty: Callable[[int], torch.Tensor], slots: int, counters: Counters) -> None:
        self._empty = empty
        self._slots = [Slot(empty(0)) for _ in range(slots)]
        self._next = 0
        self._counters = counters

    @property
    def nbytes(self) -> int:
        """Return the bytes held by all slots."""
        return sum(slot.buffer.numel() for slot in self._slots)

    def take(self, nbytes: int) -> Slot | None:
        """Return the next free slot, of at least `nbytes`; None while all are taken."""
        for _ in self._slots:
            slot = self._slots[self._next]
            self._next = (self._next + 1) % len(self._slots)
            if not slot.taken:
                break
        else:
            return None
        if slot.done is not None:
            self._counters.stalls += 1
            slot.done.synchronize()
            slot.done = None
        if slot.buffer.numel() < nbytes:
            slot.buffer = self._empty(0)  # free before growing
            slot.buffer = self._empty(nbytes)
            slot.fresh = True
        slot.taken = True
        return slot

    def give(self, slot: Slot, done: Event | None) -> None:
        """Give a slot back, to be taken again after `done`."""
        slot.taken, slot.done = False, done

    def clear(self) -> None:
        """Free the memory of the slots that are not taken."""
        for slot in self._slots:
            if not slot.taken:
                if slot.done is not None:
                    slot.done.synchronize()
                slot.buffer, slot.done = self._empty(0), None
