"""Host memory that a device can reach by itself: page-aligned, locked, and back with the system once nobody uses it."""

from __future__ import annotations

import mmap
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache

import torch

from .readers import reader_count

# What one thread touches at once.
PART_BYTES = 32 << 20

# Pages that a driver refused to unlock. The driver may still use them, so they are never freed.
_stuck: list[mmap.mmap] = []


def anonymous(nbytes: int) -> mmap.mmap:
    """Return `nbytes` of zeroed pages of this process alone, large ones where the system has them."""
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that was built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


@cache
def _touchers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(reader_count(), "spillway-touch")


def touch(memory: torch.Tensor) -> None:
    """Have every page of 1-D uint8 memory there, by several threads.

    A driver that locks pages which are not there yet has the system make them one after the other, in its own lock,
    and kernels are not launched meanwhile. On a machine with an H100 it locked 3 GB/s of small pages so, 6 GB/s of
    large ones, and 16 GB/s with eight threads that touch them first.
    """
    parts: list[torch.Tensor | None] = list(memory.split(PART_BYTES))

    def clear(index: int) -> None:
        part, parts[index] = parts[index], None  # a thread keeps what it was given until its next task
        assert part is not None
        part[:: mmap.PAGESIZE].zero_()

    list(_touchers().map(clear, range(len(parts))))


def locked(nbytes: int, lock: Callable[[int, int], None], unlock: Callable[[int], bool]) -> torch.Tensor:
    """Return host memory as 1-D uint8. Calls `lock(address, nbytes)` now, `unlock(address)` after its last view.

    torch's own page-locked memory is rounded up to a power of two and kept for ever. Models are gigabytes, and other
    programs want that memory back. Raises what `lock` raises, and OSError where there are no pages.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    pages = anonymous(nbytes)
    # Held by the tensor's storage, so it ends with the last view of the tensor.
    held = memoryview(pages)
    with torch.inference_mode(False):  # threads that are not in inference mode write into it
        memory = torch.frombuffer(held, dtype=torch.uint8)
    touch(memory)
    lock(memory.data_ptr(), nbytes)
    # Not at exit, when the driver may be gone already.
    weakref.finalize(held, _give_back, pages, memory.data_ptr(), unlock).atexit = False
    return memory


def _give_back(pages: mmap.mmap, address: int, unlock: Callable[[int], bool]) -> None:
    if not unlock(address):
        _stuck.append(pages)
