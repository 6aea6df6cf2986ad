"""The system's page cache: what was read last stays, in the memory that nobody else has taken."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable


class PageCache:
    """room: tells how many bytes it may hold now. What was read longest ago goes first."""

    def __init__(self, room: Callable[[], int]) -> None:
        self._room = room
        self._held: OrderedDict[Hashable, int] = OrderedDict()
        self.nbytes = 0

    def read(self, key: Hashable, nbytes: int) -> bool:
        """Note that a part of a file is read. Say whether it was there."""
        self._shrink(0)
        found = key in self._held
        if found:
            self._held.move_to_end(key)
        else:
            self._shrink(nbytes)
            self._held[key] = nbytes
            self.nbytes += nbytes
        return found

    def leave(self, key: Hashable) -> None:
        """Forget a part of a file."""
        self.nbytes -= self._held.pop(key, 0)

    def _shrink(self, coming: int) -> None:
        room = self._room() - coming
        while self._held and self.nbytes > room:
            _, nbytes = self._held.popitem(last=False)
            self.nbytes -= nbytes
