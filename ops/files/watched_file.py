"""Notices that a file which stays open is written to or cut short. Weights are read from it at any time."""

from __future__ import annotations

import hashlib
import os
import time
import weakref
from contextlib import suppress
from pathlib import Path

from .coming_file import ComingFile
from .lost_pages import lost
from .safetensors_header import SourceError, unreadable

# Seconds between two questions of `check_often`. A layer of a real model takes longer.
INTERVAL = 0.001
# Of a sample: a few milliseconds on a disk that holds models.
BLOCKS, BLOCK = 64, 4096


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
        self.fd = os.dup(fd)
        weakref.finalize(self, os.close, self.fd)
        self._sample = b"" if coming is not None else self._sampled()
        self._note(os.fstat(self.fd))
        self._next, self._is_lost = 0.0, False

    def _note(self, status: os.stat_result) -> None:
        """Note what the file is now."""
        self._opened, self._changed = (status.st_size, status.st_mtime_ns), status.st_ctime_ns

    def check(self) -> None:
        """Raise FileChanged where the file has changed since it was opened. Takes about a microsecond.

        Without it, a read beyond a new end would end the process, and one of other numbers would mix two models.
        """
        status = os.fstat(self.fd)
        if (status.st_size, status.st_mtime_ns) != self._opened:
            if not self._still_comes(status):
                raise changed(self.path, self._opened[0], status.st_size)
        elif status.st_ctime_ns != self._changed and not self._is_whole(status):
            raise changed(self.path, self._opened[0], status.st_size)
        if self._is_lost:
            raise lost(self.path)

    def lose(self) -> None:
        """Note that the map of the file has lost pages, and has empty ones in their place."""
        self._is_lost = True

    def _still_comes(self, status: os.stat_result) -> bool:
        """Say whether it is the download that has written to the file."""
        coming = self._coming
        if coming is None:
            return False
        if coming.stamp is None:
            return status.st_size == self._opened[0]
        # Only what is the same as when it was whole is believed, also where it was written to since.
        self._coming, self._sample = None, self._sampled()
        self._note(status)
        self._opened = coming.stamp
        return (status.st_size, status.st_mtime_ns) == coming.stamp

    def _is_whole(self, status: os.stat_result) -> bool:
        """Say whether the numbers are what they were, where size and time of the content are the same.

        Whoever writes into a file may set its time back. The time of any change is set anew by that. But it is by what
        becomes of names, rights and attributes too, and by a backup that leaves no trace of its reading.
        """
        if self._coming is None and self._sampled() != self._sample:
            return False
        self._note(status)
        return True

    def _sampled(self) -> bytes:
        """Hash blocks of the file, its first and its last among them. One of other numbers differs in nearly all.

        Where there is no such read (Windows), there is no time of any change either.
        """
        if not hasattr(os, "pread"):
            return b""
        size, digest = os.fstat(self.fd).st_size, hashlib.blake2b(digest_size=16)
        last = max(0, size - BLOCK)
        try:
            for place in dict.fromkeys(number * last // (BLOCKS - 1) for number in range(BLOCKS)):
                digest.update(os.pread(self.fd, BLOCK, place))
        except OSError as error:
            raise unreadable(self.path, error) from error
        return digest.digest()

    def leave_cache(self, offset: int, nbytes: int) -> None:
        """Let the system's page cache forget a range of the file, so that its memory goes to something else first.

        Pages that somebody has mapped stay. Nothing happens where the system takes no such advice.
        """
        advise = getattr(os, "posix_fadvise", None)
        if advise is not None:
            with suppress(OSError):  # a file system that takes no advice
                advise(self.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

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
