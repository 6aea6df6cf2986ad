"""The system's page cache: what was read last stays, in the memory that nobody else has taken."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable


class PageCache:
    """room: tells how many bytes it may hold now. What was read longest ago goes first."""

    def __init__(self, room: Callable[[], int]) -> None:
        self._room = room
        self._held: OrderedDict[Hashable, int] = OrderedDict()
        self._bytes = 0

    def read(self, key: Hashable, nbytes: int) -> bool:
        """Note that a part of a file is read. Say whether it was there."""
        self._shrink(0)
        found = key in self._held
        if found:
            self._held.move_to_end(key)
        else:
            self._shrink(nbytes)
            self._held[key] = nbytes
            self._bytes += nbytes
        return found

    def _shrink(self, coming: int) -> None:
        room = self._room() - coming
        while self._held and self._bytes > room:
            _, nbytes = self._held.popitem(last=False)
            self._bytes -= nbytes
