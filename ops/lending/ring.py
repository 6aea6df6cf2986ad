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
    """At most `slots` buffers, whose sizes follow the bundles that pass through them.

    `take` blocks the launching thread until the slot's last use is done. Without this wait the next transfer would
    overwrite a buffer that a kernel still reads. It also keeps that thread from running ahead by more than the ring.
    """

    def __init__(self, empty: Callable[[int], torch.Tensor], slots: int, counters: Counters) -> None:
        self._empty = empty
        self._nothing = empty(0)
        self._slots = [Slot(self._nothing) for _ in range(slots)]  # the one that was used longest ago first
        self._counters = counters

    @property
    def nbytes(self) -> int:
        """Return the bytes held by all slots."""
        return sum(slot.buffer.numel() for slot in self._slots)

    @property
    def taken_bytes(self) -> int:
        """Return the bytes held by the slots that are taken."""
        return sum(slot.buffer.numel() for slot in self._slots if slot.taken)

    def take(self, nbytes: int, limit: int | None = None) -> Slot | None:
        """Return a free slot of at least `nbytes`; None while all are taken.

        limit: the most bytes that the ring may hold with it. Free slots are emptied for that. Where the slots that are
        taken leave too little, the slot is granted all the same, as just large enough.
        """
        free = [slot for slot in self._slots if not slot.taken]
        if not free:
            return None
        room = nbytes if limit is None else max(nbytes, limit - self.taken_bytes)
        slot = free[0]
        if limit is not None and slot.buffer.numel() < nbytes and self.nbytes + nbytes > limit:
            # A buffer that is there saves a new one, for which the transfer would have to wait.
            slot = next((other for other in free if nbytes <= other.buffer.numel() <= room), slot)
        self._slots.remove(slot)
        self._slots.append(slot)
        if slot.done is not None:
            self._counters.stalls += 1
            slot.done.synchronize()
            slot.done = None
        size = slot.buffer.numel()
        if size < nbytes or (limit is not None and size > room):
            slot.buffer = self._nothing  # free before growing
            if limit is not None:
                self.trim(limit - nbytes)
            slot.buffer = self._empty(nbytes)
            slot.fresh = True
        elif limit is not None:
            self.trim(limit, but=slot)
        slot.taken = True
        return slot

    def give(self, slot: Slot, done: Event | None) -> None:
        """Give a slot back, to be taken again after `done`."""
        slot.taken, slot.done = False, done

    def trim(self, nbytes: int, but: Slot | None = None) -> None:
        """Empty free slots, the one used longest ago first, until the ring holds no more than `nbytes`.

        but: a slot to leave alone.
        """
        for slot in self._slots:
            if self.nbytes <= nbytes:
                break
            if not slot.taken and slot is not but and slot.buffer.numel():
                if slot.done is not None:
                    slot.done.synchronize()
                slot.buffer, slot.done = self._nothing, None

    def clear(self) -> int:
        """Free the memory of the slots that are not taken. Return the bytes freed."""
        before = self.nbytes
        self.trim(0)
        return before - self.nbytes
