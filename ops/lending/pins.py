"""Pins: host memory, page-locked where the device gains from it, that holds a bundle ready for one transfer."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..device.backend import Backend, Event
from ..device.readers import Later
from ..ram import available
from .bundle import Bundle
from .pin_blocks import BLOCK_BYTES, Extent, PinBlocks

# Blocks that may be on their way at once. While a driver locks one, threads touch the next.
COMING = 3

_uses = itertools.count(1)


@dataclass(eq=False)
class Pin:
    """A bundle in host memory. version: of the final form that it holds; None for the bytes of the source.

    holders: a reader that copies the source into it, and a transfer that is yet to be started.
    """

    extent: Extent
    version: int | None
    holders: int = 0
    used: int = 0  # grows with every use
    ready: Event | None = None  # a write-back that may still be under way
    busy: Event | None = None  # the last transfer out of it

    @property
    def buffer(self) -> torch.Tensor:
        return self.extent.view


class Pins:
    """The pins of one model under a budget in bytes.

    room: tells how many bytes of RAM pins may still take, whatever the budget. Any thread may call. Locking memory
    takes time, so threads of its own do that, block after block, and until one is there a bundle goes without.
    """

    def __init__(self, backend: Backend, budget: int, room: Callable[[], int] = lambda: 1 << 62) -> None:
        self.backend = backend
        self.budget = budget
        self.room = room
        self.outgrow_ram = False  # they and the file are more than RAM has room for
        self.used = 0  # bytes of pins; the blocks that they lie in may hold more
        self.changes = 0  # how often a final form came or went: costs are not what they were
        self._blocks = PinBlocks()
        self._coming: deque[tuple[int, Later[torch.Tensor]]] = deque()  # the next blocks and their bytes
        self._expected: list[Bundle] = []
        self._position: dict[Bundle, int] = {}
        self._last: set[Bundle] = set()  # those that wait until the others have theirs
        self._due: set[Bundle] = set()  # the others that have none yet
        self._refused: dict[Bundle, int] = {}  # how often one has got no memory as pages of the file lie there
        self._full = False  # no more memory comes, and what is left of it does for none of those
        self._pins: dict[Bundle, Pin] = {}
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """Return the bytes of host memory that the pins cost."""
        return self._blocks.nbytes + self._reserved

    @property
    def _reserved(self) -> int:
        """Return the bytes that are on their way. Threads of other models ask too, while this one's change them."""
        return sum(nbytes for nbytes, _ in list(self._coming))

    def expect(self, bundles: Sequence[Bundle]) -> None:
        """Note which bundles will ask for a pin, in the order of their use, so that memory comes ahead of them."""
        with self._changed:
            self._expected = list(bundles)
            self._position = {bundle: index for index, bundle in enumerate(self._expected)}
            self._last, self._full = self._left_out(), False
            self._due = {b for b in self._expected if b not in self._last and b not in self._pins and _wants(b)}

    def _left_out(self) -> set[Bundle]:
        """Choose what is read at each step where memory has no room for all, spread evenly over the step.

        One row of them would be waited for, as staging memory has no room for all that could be read before.
        """
        wanted = {bundle: _pin_bytes(bundle) for bundle in self._expected if _wants(bundle)}
        room, total = min(self.budget, self.held + max(0, self.room())), sum(wanted.values())
        if room >= total:
            return set()
        left_out, due = set(), 0.0
        for bundle, nbytes in wanted.items():
            due += nbytes * room / total
            if bundle in self._pins or due >= nbytes:
                due -= nbytes
            else:
                left_out.add(bundle)
        return left_out

    def set_budget(self, nbytes: int) -> None:
        """Change the bytes that the pins may hold. Pins above the budget are freed at once."""
        self.budget = nbytes
        self.free(self.held - nbytes)

    def get(self, bundle: Bundle) -> Pin | None:
        """Return the pin of a bundle, in whatever form it is; None where it has none."""
        pin = self._pins.get(bundle)
        if pin is not None:
            pin.used = next(_uses)
        return pin

    def take(self, bundle: Bundle, nbytes: int, version: int | None) -> Pin | None:
        """Replace a bundle's pin by a new one of `nbytes`. Return None where the budget has no room for it.

        Access is cyclic, so evicting another bundle's pin would only move the miss. But pins of bundles that stay on
        the device by now give way, and a final form (`version` is set) displaces bytes of the source. A pin without a
        version is held until `release`.
        """
        with self._changed:
            self.drop(bundle)
            if self._waits(bundle):
                return None
            extent = self._find(bundle, nbytes)
            if extent is None and not self._coming:
                extent = self._displace(bundle, nbytes, version)
                none_comes = min(self.budget - self.held, self._room_left()) < nbytes
                self._full = self._full or (extent is None and none_comes)
            if extent is None:
                return None
            pin = self._pins[bundle] = Pin(extent, version, holders=int(version is None), used=next(_uses))
            self._due.discard(bundle)
            self.used += nbytes
            self.changes += bundle.pin_changed(version)
            return pin

    def displace_pages(self) -> bool:
        """Say whether what is read from a file now should leave the page cache at once.

        Memory that is locked would take the place of what was read longest ago, and that is what is read next.
        """
        return self.outgrow_ram and available.unused_ram() < (1 + COMING) * BLOCK_BYTES

    def make_room(self, bundle: Bundle, nbytes: int) -> None:
        """See to it that memory comes for a pin that is taken later."""
        with self._changed:
            found = bundle in self._pins or self._waits(bundle)
            extent = None if found else self._find(bundle, nbytes)
            if extent is not None:
                extent.block.join(extent)

    def holds(self, bundle: Bundle) -> bool:
        """Say whether a bundle has a pin that is of use, in whatever form."""
        pin = self._pins.get(bundle)
        return pin is not None and pin.version in (None, bundle.version)

    def hold(self, bundle: Bundle, pin: Pin) -> bool:
        """Keep a pin where it is until `release`. Return False where it has gone."""
        with self._changed:
            if self._pins.get(bundle) is not pin:
                return False
            pin.holders += 1
            return True

    def release(self, pin: Pin) -> None:
        """Let a pin go again, which was taken to be filled or held."""
        with self._changed:
            pin.holders = max(0, pin.holders - 1)  # it may have been given up
            self._changed.notify_all()

    def _waits(self, bundle: Bundle) -> bool:
        """Say whether a bundle gets a pin only once others have theirs."""
        return bundle in self._last and bool(self._due) and not self._full

    def _find(self, bundle: Bundle, nbytes: int) -> Extent | None:
        """Return an extent for the bundle. Where the budget allows, new memory is on its way for who asks later."""
        if bundle.offload_to == "disk":
            return None
        if bundle.offload_to == "ram":  # ordinary memory, as the policy asks for
            size = self._blocks.room_for(nbytes, nbytes, self.budget - self._reserved, self.room)
            with torch.inference_mode(False):
                return self._blocks.add(torch.empty(size, dtype=torch.uint8)).cut(nbytes) if size else None
        self._add_what_came()
        extent = self._blocks.cut(nbytes)
        while len(self._coming) < COMING:
            size = self._next_block(bundle, nbytes, found=extent is not None)
            if not size:
                break
            self._coming.append((size, self.backend.readers().aside(partial(self.backend.host_empty, size))))
            if self._add_what_came():
                return extent or self._blocks.cut(nbytes)
        return extent

    def _add_what_came(self, wait: bool = False) -> bool:
        """Use memory that has come. wait: for all of it. Return False where there was none."""
        came = False
        while self._coming and (wait or self._coming[0][1].ready()):
            memory = self._coming[0][1].result()
            self._coming.popleft()
            self._blocks.add(memory)
            came = True
        return came

    def _displace(self, bundle: Bundle, nbytes: int, version: int | None) -> Extent | None:
        """Free pins that are of less use until this one fits; None where it never does."""
        if bundle not in self._position:
            return None
        idle = [other for other in self._pins if other not in self._position]
        raw = [other for other, pin in self._pins.items() if pin.version is None] if version is not None else []
        for other in dict.fromkeys((*idle, *raw)):
            pin = self._pins.get(other)
            if pin is not None and not pin.holders:
                block = pin.extent.block
                self.drop(other)
                extent = block.cut(nbytes)
                if extent is not None:
                    return extent
        return None

    def _next_block(self, bundle: Bundle, nbytes: int, found: bool) -> int:
        """Return the bytes of the block that is to come; 0 for none. It ends where a bundle ends.

        found: the bundle has its `nbytes`, and the block is for those that ask after it, as far as what is there does
        not do for them.
        """
        reserved = self._reserved
        if found:
            total, there = 0, self._blocks.nbytes + reserved - self.used - nbytes
        elif reserved >= nbytes:  # which is for this bundle first
            total, there = 0, reserved - nbytes
        else:
            total, there = nbytes, 0
        least = total
        if self.held >= self.budget or there >= COMING * BLOCK_BYTES or self._displaces(bundle):
            return 0
        at = self._position.get(bundle, -1) + 1
        for following in (*self._expected[at:], *self._expected[: max(0, at - 1)]):
            if not _wants(following) or following in self._pins or self._waits(following):
                continue
            more = _pin_bytes(following)
            if more <= there:
                there -= more
                continue
            there = 0
            if total + more > BLOCK_BYTES and total:
                break
            total += more
            least = least or more
        return self._blocks.room_for(least, total, self.budget - reserved, self._room_left) if total else 0

    def _displaces(self, bundle: Bundle) -> bool:
        """Say whether one more block would take the place of pages that are yet to be read.

        What is read leaves the page cache, and makes room. A bundle that asks again, in the next step, need not wait.
        """
        if not self.outgrow_ram or available.unused_ram() - self._reserved >= BLOCK_BYTES:
            return False
        asked = self._refused[bundle] = self._refused.get(bundle, 0) + 1
        return asked <= 1 + bundle.worth_writing_back  # which asks ahead of its reading, too

    def _room_left(self) -> int:
        """Return the bytes of RAM beside those that are on their way, which may not be taken yet."""
        return self.room() - self._reserved

    def drop(self, bundle: Bundle) -> int:
        """Free a bundle's pin for other pins to use. Return its bytes."""
        with self._changed:
            pin = self._pins.get(bundle)
            if pin is None:
                return 0
            while pin.holders:  # a reader writes into it, and would write into what the next pin gets
                self._changed.wait()
            if self._pins.get(bundle) is not pin:
                return 0
            for event in (pin.ready, pin.busy):
                if event is not None:
                    # A transfer may still read it. Without this wait the next pin's bytes would travel in its place.
                    event.synchronize()
            return self._remove(bundle, pin)

    def give_up(self, bundle: Bundle, pin: Pin) -> None:
        """Free a pin that could not be filled, so that no transfer ever reads it."""
        with self._changed:
            pin.holders = 0
            self._changed.notify_all()
            if self._pins.get(bundle) is pin:
                self._remove(bundle, pin)

    def _remove(self, bundle: Bundle, pin: Pin) -> int:
        del self._pins[bundle]
        nbytes = pin.buffer.numel()
        self.used -= nbytes
        self.changes += bundle.pin_changed(None)
        pin.extent.block.join(pin.extent)
        return nbytes

    def free(self, nbytes: float) -> int:
        """Give whole blocks back to the system, the least recently used first, until that many bytes are free.

        Returns the bytes freed.
        """
        if nbytes <= 0:
            return 0
        with self._changed:
            self._add_what_came(wait=True)
            last_use = dict.fromkeys(self._blocks.blocks, -1)
            for pin in self._pins.values():
                last_use[pin.extent.block] = max(last_use[pin.extent.block], pin.used)
            freed = 0
            for block in sorted(last_use, key=lambda block: last_use[block]):
                if freed >= nbytes:
                    break
                for bundle in [bundle for bundle, pin in self._pins.items() if pin.extent.block is block]:
                    self.drop(bundle)
                if block.is_free:  # a reader may have cut it while a drop waited
                    freed += self._blocks.drop(block)
            return freed


def _wants(bundle: Bundle) -> bool:
    """Say whether a bundle is to have a pin of locked memory."""
    return bundle.offload_to not in ("disk", "ram")


def _pin_bytes(bundle: Bundle) -> int:
    """Return the bytes that a bundle's pin will take."""
    return bundle.nbytes if bundle.worth_keeping else min(bundle.nbytes, bundle.source_bytes)
