"""Tunes the C library's allocator before torch is imported, reads its figures, and gives memory back.

prestartup_script.py runs this file by its path, before torch, so it imports the standard library alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any

# Name under which prestartup_script.py leaves its copy of this module behind.
EARLY = "spillway_allocator"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# From this size on a block is a map of its own, and goes back to the system as it is freed. glibc starts at 128 KiB but
# raises the threshold to 32 MiB as blocks are freed. Images and latents would then stay in its arenas.
MMAP_THRESHOLD = 4 << 20
# While a CPU computes step after step, which asks for the same blocks each time. It is the most that glibc takes, and
# goes up to by itself. A block with a map of its own would be cleared page by page at each step.
COMPUTING_THRESHOLD = 32 << 20
USERS_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")

# done: what `tune` did, in words; None before `tune` ran. tuned: whether the threshold is Spillway's.
# threshold: what it is now, in bytes.
done: str | None = None
tuned = False
threshold = MMAP_THRESHOLD


@functools.cache
def _libc() -> Any:
    """Return glibc, or None on other systems (also musl, which has no mallopt)."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def has_heaps() -> bool:
    """Say whether each thread allocates in a heap of its own."""
    return _libc() is not None


def tune(wanted: bool = True) -> str:
    """Fix glibc's mmap threshold. Say what was done, or why nothing was. wanted: the value of SPILLWAY_ALLOCATOR."""
    global done
    done = _tune(wanted)
    return done


def _tune(wanted: bool) -> str:
    global tuned
    if not wanted:
        return "left alone: SPILLWAY_ALLOCATOR=0"
    own = [name for name in USERS_OWN if os.environ.get(name)]
    if own:
        return f"left alone: {own[0]} is set"
    libc = _libc()
    if libc is None:
        return "left alone: it is not glibc's"
    if not libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD):
        return "left alone: mallopt refused a new mmap threshold"
    libc.mallopt(M_TRIM_THRESHOLD, MMAP_THRESHOLD)
    tuned = True
    return f"mmap threshold fixed at {MMAP_THRESHOLD >> 20} MiB, trim threshold too"


def _tuner() -> Any:
    """Return the copy of this module whose `tune` ran: that of prestartup_script.py where there is one."""
    return sys.modules.get(EARLY) or sys.modules[__name__]


def what_was_done() -> str:
    """Say in words what was tuned in this process."""
    return _tuner().done or "not tuned: prestartup_script.py did not run"


def begin_computing() -> None:
    """Let blocks that a CPU computes in be used again in the next step, where `tune` chose the threshold."""
    _keep_below(COMPUTING_THRESHOLD, 2 * COMPUTING_THRESHOLD)  # of the end of the heap, as glibc itself would keep


def end_computing() -> None:
    """Give back to the system what was kept for the next step. Without `begin_computing` this does nothing."""
    if _keep_below(MMAP_THRESHOLD, MMAP_THRESHOLD):
        trim()


def _keep_below(nbytes: int, end: int) -> bool:
    """Choose from how many bytes on blocks go back to the system as they are freed. Say whether that is a change.

    end: from how many on the free end of the heap does.
    """
    tuner = _tuner()
    if not tuner.tuned or tuner.threshold == nbytes:
        return False
    tuner.threshold = nbytes
    libc = _libc()
    libc.mallopt(M_MMAP_THRESHOLD, nbytes)
    libc.mallopt(M_TRIM_THRESHOLD, end)
    return True


def trim() -> bool:
    """Give free memory of all arenas back to the system. Say whether any went. False without malloc_trim."""
    libc = _libc()
    return bool(libc is not None and libc.malloc_trim(0))


FIELDS = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def arenas() -> dict[str, int]:
    """Return the bytes of all arenas, those used, those free but not given back, and in maps; {} without mallinfo2."""
    libc = _libc()
    if libc is None or not hasattr(libc, "mallinfo2"):
        return {}
    libc.mallinfo2.restype = _Mallinfo2
    info = libc.mallinfo2()
    return {"arenas": info.arena, "used": info.uordblks, "free": info.fordblks, "mapped": info.hblkhd}
