"""The memory map of a file, which knows whether the file is what was opened, and whether a range of it has come."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from ..ram.available import available_ram
from ..ram.process_limits import private_room
from .coming_file import ComingFile, Range
from .watched_file import WatchedFile


class MappedFile(mmap.mmap):
    """The map of a file. It lives as long as a tensor in it, and knows whether the file is what was opened.

    coming: of a file of which a part has yet to come; None once it is whole.
    """

    address: int
    file_bytes: int
    check_unchanged: Callable[[], None]
    watched: WatchedFile
    coming: ComingFile | None = None

    def check(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Raise FileChanged where the file has changed since it was opened. Wait until the range has come.

        Whoever does not say what he is about to read waits for all of the file.
        """
        self.check_unchanged()
        coming = self.coming
        if coming is None:
            return
        coming.wait(offset, nbytes)
        if coming.is_whole:
            self.coming = None

    def check_all(self, ranges: Sequence[Range]) -> None:
        """Do so for many ranges, which come at the same time."""
        self.check_unchanged()
        if self.coming is not None:
            self.coming.expect(ranges, soon=True)
        for offset, nbytes in ranges:
            self.check(offset, nbytes)

    @property
    def path(self) -> Path:
        """The file's path."""
        return self.watched.path

    def lose(self) -> None:
        """Let every use from now on be an error, as a part of the map is empty."""
        self.watched.lose()

    def has(self, offset: int, nbytes: int) -> bool:
        """Say whether a range of bytes has come."""
        return self.coming is None or self.coming.has(offset, nbytes)


def map_file(file: BinaryIO, file_bytes: int) -> tuple[MappedFile, bool]:
    """Map a whole file, however large. Return the map, and whether it is read-only.

    A private writable map keeps a write in this process and off the file. But the system reserves memory for all of it
    unless told not to, which a model larger than RAM would fail. Windows cannot be told, and `ulimit -d` counts the map
    all the same. There the map is writable while that leaves as much again to others. Else it is read-only, and a write
    ends the process.
    """
    room = private_room()
    try:
        if room is not None and 2 * file_bytes > room:
            return MappedFile(file.fileno(), 0, access=mmap.ACCESS_READ), True
        if sys.platform != "win32":
            no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0x40)
            flags, prot = mmap.MAP_PRIVATE | no_reserve, mmap.PROT_READ | mmap.PROT_WRITE
            return MappedFile(file.fileno(), 0, flags=flags, prot=prot), False
        if 2 * file_bytes <= available_ram().available:
            return MappedFile(file.fileno(), 0, access=mmap.ACCESS_COPY), False
    except OSError:  # a system that never overcommits
        pass
    return MappedFile(file.fileno(), 0, access=mmap.ACCESS_READ), True
