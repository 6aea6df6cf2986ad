"""Says when this process was started: what has changed since may be older here than it is on the disk."""

from __future__ import annotations

import os
import sys
import time

import psutil


def process_start() -> int:
    """Return that moment in ns since 1970, up to a hundredth of a second too early.

    psutil's is up to a second too early on Linux, as it adds to the system's own start, of which the kernel tells whole
    seconds. A package that was installed in that second would count as one that has changed since.
    """
    if sys.platform == "linux":
        try:
            with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
                ticks = int(file.read().rpartition(")")[2].split()[19])  # since the system's start, see man 5 proc
            ago = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
            return int((time.time() - ago) * 1e9)
        except (OSError, ValueError, IndexError):  # no /proc, or another system's
            pass
    return int(psutil.Process().create_time() * 1e9)
