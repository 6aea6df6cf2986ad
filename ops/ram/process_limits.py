"""Limits that a process carries by itself on Linux: `ulimit -v` (its addresses) and `ulimit -d` (its private memory).

Beyond them an allocation fails at once, however much memory is free.
"""

from __future__ import annotations

import mmap
import sys
from dataclasses import dataclass
from pathlib import Path

if sys.platform == "linux":
    import resource

# The fields of /proc/self/statm that the two limits are compared with, in pages.
ADDRESSES, DATA = 0, 5


@dataclass(frozen=True)
class ProcessLimit:
    """name: in words. limit, used: bytes. option: of the shell's `ulimit` that sets it."""

    name: str
    limit: int
    used: int
    option: str

    @property
    def available(self) -> int:
        """Return the bytes that this process can still take."""
        return max(0, self.limit - self.used)


def process_limits() -> list[ProcessLimit]:
    """Return the limits that are set for this process. None are on other systems."""
    found: list[ProcessLimit] = []
    if sys.platform != "linux":
        return found
    for kind, place, option, name in (
        (resource.RLIMIT_AS, ADDRESSES, "-v", "the limit of address space (ulimit -v)"),
        (resource.RLIMIT_DATA, DATA, "-d", "the limit of private memory (ulimit -d)"),
    ):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
            found.append(ProcessLimit(name, limit, int(pages[place]) * mmap.PAGESIZE, option))
    return found


def private_room() -> int | None:
    """Return the bytes of private memory that may still be mapped; None where no limit counts them."""
    rooms = [limit.available for limit in process_limits() if limit.option == "-d"]
    return rooms[0] if rooms else None
