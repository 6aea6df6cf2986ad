"""Reads a file past the system's page cache, in large aligned pieces.

For bytes that no later read is to find in the page cache: there they would take the place of what is read next. The
disk writes into memory of this process, so a core has a fifth of the work, and no read waits for the one before.
Linux alone, with O_DIRECT (man 2 open). Where there is none, or a file system refuses it, the memory map is read.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import threading
import weakref

import numpy

from ..device.locked_memory import anonymous

# Offsets, lengths and memory of such reads are multiples of a disk's block. No disk has larger ones.
BLOCK = 4096
# Bytes of one read, and of the memory that each thread keeps for it.
PIECE = 4 << 20
LARGE_PAGE = 2 << 20

_own = threading.local()


class PastCache:
    """A file that is open as `fd`. Any thread may read; the file that was opened counts, not its name."""

    def __init__(self, fd: int) -> None:
        self._watched, self._fd, self._refused = fd, -1, not hasattr(os, "O_DIRECT")
        self._lock = threading.Lock()

    def read(self, target: numpy.ndarray, offset: int, mapped: numpy.ndarray) -> bool:
        """Read a range of the file into `target`. Return False where the map is to be read, whatever is there by now.

        target: uint8 of host memory, as long as the range. mapped: the same range of the map, from which comes what
        the page cache has.
        """
        if not self._is_open():
            return False
        done = 0
        while done < len(target):
            count = min(len(target) - done, PIECE - (offset + done) % BLOCK)
            piece, there = target[done : done + count], mapped[done : done + count]
            if in_page_cache(there.ctypes.data) and in_page_cache(there.ctypes.data + count - 1):
                numpy.copyto(piece, there)
            elif not self._read_piece(piece, offset + done):
                return False
            done += count
        return True

    def _read_piece(self, target: numpy.ndarray, offset: int) -> bool:
        before = offset % BLOCK
        needed = before + len(target)
        memory = _memory()
        try:
            came = os.preadv(self._fd, [memory[: -(-needed // BLOCK) * BLOCK]], offset - before)
        except OSError:  # a file system that knows no such reads, or a disk that fails, of which the map tells
            self._refused = True
            return False
        if came < needed:  # cut short, of which the map tells too
            return False
        numpy.copyto(target, numpy.frombuffer(memory, numpy.uint8, len(target), before))
        return True

    def _is_open(self) -> bool:
        with self._lock:
            if self._fd < 0 and not self._refused:
                try:
                    # By its number: by its name, it might be another file by now.
                    self._fd = os.open(f"/proc/self/fd/{self._watched}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
                    weakref.finalize(self, os.close, self._fd)
                except OSError:
                    self._refused = True
            return not self._refused


def _memory() -> memoryview:
    """Return this thread's memory for reads: large pages, as a request to a disk lists every page that it fills."""
    if not hasattr(_own, "memory"):
        pages = anonymous(PIECE + LARGE_PAGE)
        start = -numpy.frombuffer(pages, numpy.uint8).ctypes.data % LARGE_PAGE
        _own.memory = memoryview(pages)[start : start + PIECE]
    return _own.memory  # type: ignore[no-any-return]


def in_page_cache(address: int) -> bool:
    """Say whether the page of a file's map at `address` would be read without the disk.

    Of a file that this user may not write to, Linux says that of every page.
    """
    page, there = address // mmap.PAGESIZE * mmap.PAGESIZE, ctypes.c_ubyte()
    return _libc().mincore(ctypes.c_void_p(page), ctypes.c_size_t(1), ctypes.byref(there)) != 0 or there.value & 1 == 1


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
