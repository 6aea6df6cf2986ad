"""Notices that a file which stays open is written to or cut short. Weights are read from it at any time."""

from __future__ import annotations

import os
import time
import weakref
from contextlib import suppress
from pathlib import Path

from .coming_file import ComingFile
from .safetensors_header import SourceError

# Seconds between two questions of `check_often`. A layer of a real model takes longer.
INTERVAL = 0.001


class FileChanged(SourceError):
    """A file that is in use is no longer what it was when it was opened."""


def stamp(fd: int) -> tuple[int, int]:
    """Return the size of an open file and the time of its last change."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


class WatchedFile:
    """Holds a file open and compares what the system says of it. The file that was opened counts, not its name.

    A file that another one replaces by renaming stays whole for who has it open. coming: a file of which a part has yet
    to come is written to all the time. What it is when it is whole, it must stay.
    """

    def __init__(self, path: Path, fd: int, coming: ComingFile | None = None) -> None:
        self.path, self._coming = path, coming
        self._fd = os.dup(fd)
        weakref.finalize(self, os.close, self._fd)
        self._note(os.fstat(self._fd))
        self._next = 0.0

    def _note(self, status: os.stat_result) -> None:
        """Note what the file is now."""
        self._opened, self._changed = (status.st_size, status.st_mtime_ns), status.st_ctime_ns
        self._around = self._what_is_around(status)

    def check(self) -> None:
        """Raise FileChanged where the file has changed since it was opened. Takes about a microsecond.

        Without it, a read beyond a new end would end the process, and one of other numbers would mix two models.
        """
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != self._opened:
            if not self._still_comes(status):
                raise changed(self.path, self._opened[0], status.st_size)
        elif status.st_ctime_ns != self._changed and not self._is_whole(status):
            raise changed(self.path, self._opened[0], status.st_size)

    def _still_comes(self, status: os.stat_result) -> bool:
        """Say whether it is the download that has written to the file."""
        coming = self._coming
        if coming is None:
            return False
        if coming.stamp is None:
            return status.st_size == self._opened[0]
        # Only what is the same as when it was whole is believed, also where it was written to since.
        self._coming = None
        self._note(status)
        self._opened = coming.stamp
        return (status.st_size, status.st_mtime_ns) == coming.stamp

    def _is_whole(self, status: os.stat_result) -> bool:
        """Say whether something else than its numbers changed, where size and time of the content are the same.

        Whoever writes into a file may set its time back. The time of any change is set anew by that, and by what
        becomes of names, owners, rights and attributes too, which can be looked at.
        """
        if self._coming is not None:
            return True
        if self._what_is_around(status) != self._around:
            self._note(status)
        return status.st_ctime_ns == self._changed  # which another thread may have noted just now

    def _what_is_around(self, status: os.stat_result) -> tuple[object, ...]:
        """Return what may change of a file while its numbers stay."""
        try:
            named: object = os.path.samestat(os.stat(self.path), status)
        except OSError:
            named = None
        attributes: object = None
        if hasattr(os, "listxattr"):
            with suppress(OSError):  # a file system that has none
                attributes = {name: os.getxattr(self._fd, name) for name in os.listxattr(self._fd)}
        return named, attributes, status.st_nlink, status.st_mode, status.st_uid, status.st_gid

    def leave_cache(self, offset: int, nbytes: int) -> None:
        """Let the system's page cache forget a range of the file, so that its memory goes to something else first.

        Pages that somebody has mapped stay. Nothing happens where the system takes no such advice.
        """
        advise = getattr(os, "posix_fadvise", None)
        if advise is not None:
            with suppress(OSError):  # a file system that takes no advice
                advise(self._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def check_often(self) -> None:
        """Do what `check` does, at most once in INTERVAL. Resident weights are lent in a few microseconds."""
        now = time.monotonic()
        if now >= self._next:
            self.check()  # a file that has changed is one at every question
            self._next = now + INTERVAL


def changed(path: Path, before: int, now: int) -> FileChanged:
    """Word the error for a file of which `before` bytes were opened."""
    what = f"cut to {now} of {before} bytes" if now < before else "written to"
    return FileChanged(
        f"{path}: this file was {what} while it was in use, so its weights would be mixed with others. Run the "
        "workflow again: Spillway's loaders then read the file anew. Another loader does so after a restart."
    )
