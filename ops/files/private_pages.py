"""Tells the memory that is this process's alone, as the kernel reports it."""

from __future__ import annotations

import mmap
import os

# An entry of Linux's pagemap is 64 bits. Its top byte: 0x80 present, 0x40 swapped out, 0x20 a page of a file.
ENTRY = 8
NOT_PRIVATE = bytes(top for top in range(256) if top & 0x20 or not top & 0xC0)


def has_private_pages(address: int, nbytes: int) -> bool:
    """Say whether a page of a range of a private file map was written into, by whatever means, and is now a copy.

    address, nbytes: whole pages. Returns False where the system does not tell. Takes about 2 us for a MiB.
    """
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    except OSError:  # not Linux, or a container without it
        return False
    try:
        entries = os.pread(pagemap, nbytes // mmap.PAGESIZE * ENTRY, address // mmap.PAGESIZE * ENTRY)
    finally:
        os.close(pagemap)
    return bool(entries[ENTRY - 1 :: ENTRY].translate(None, NOT_PRIVATE))
