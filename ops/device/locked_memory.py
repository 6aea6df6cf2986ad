"""Host memory that a device can reach by itself: page-aligned, locked, and back with the system once nobody uses it."""

from __future__ import annotations

import mmap
import sys
import weakref
from collections.abc import Callable

import torch

# Pages that a driver did not unlock when it was asked to: it may still use them.
_stuck: list[mmap.mmap] = []


def anonymous(nbytes: int) -> mmap.mmap:
    """Zeroed pages of this process alone."""
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes)
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def locked(nbytes: int, lock: Callable[[int, int], None], unlock: Callable[[int], bool]) -> torch.Tensor:
    """Host memory as a uint8 tensor; `lock(address, nbytes)` is called now, `unlock(address)` after its last view.

    torch's own page-locked memory is rounded up to a power of two and kept for ever; models are gigabytes, and other
    programs want that memory back. Raises what `lock` raises, and OSError where there are no pages.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    pages = anonymous(nbytes)
    # What the tensor's storage holds: it ends with the last view of the tensor.
    held = memoryview(pages)
    memory = torch.frombuffer(held, dtype=torch.uint8)
    lock(memory.data_ptr(), nbytes)
    # Not at exit: the driver may be gone by then.
    weakref.finalize(held, _give_back, pages, memory.data_ptr(), unlock).atexit = False
    return memory


def _give_back(pages: mmap.mmap, address: int, unlock: Callable[[int], bool]) -> None:
    if not unlock(address):
        _stuck.append(pages)
