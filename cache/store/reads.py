"""Reads of entries that are under way, also those that nobody waits for any more: their RAM, and how they end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from ..disk_format import Stopped


class Reserved:
    """Bytes of RAM that reads will take. What one has taken already counts twice: so it is never too little.

    room: tells how much RAM may be taken.
    """

    def __init__(self, room: Callable[[], int]) -> None:
        self.room = room
        self.nbytes = 0
        self._lock = threading.Lock()

    @contextmanager
    def of(self, nbytes: int) -> Iterator[bool]:
        """Reserve bytes for what is done within. Yields False where they are more than is free, and reserves none."""
        with self._lock:
            fits = self.nbytes + nbytes <= self.room()
            self.nbytes += nbytes if fits else 0
        try:
            yield fits
        finally:
            with self._lock:
                self.nbytes -= nbytes if fits else 0


class Stoppable:
    """A file whose reader raises Stopped as soon as `stop` says so. A driver that hangs is not ended by it."""

    def __init__(self, file: BinaryIO, stop: Callable[[], bool]) -> None:
        self._file, self._stop = file, stop

    def readinto(self, into: Any) -> int:
        if self._stop():
            raise Stopped
        return self._file.readinto(into)  # type: ignore[attr-defined, no-any-return]

    def seek(self, place: int, whence: int = 0) -> int:
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()
