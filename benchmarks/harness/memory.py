"""How much RAM a process takes, as the operating system counts it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")


def _status_bytes(field: str) -> int | None:
    """Read a field of the kernel's account of this process, in bytes; None where there is no such account."""
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def peak_rss() -> int:
    """Return the peak resident set size of this process in bytes, mapped file pages included."""
    # getrusage on Linux also remembers the process that started this one, so the kernel's own mark comes first.
    high_water = _status_bytes("VmHWM")
    if high_water is not None:
        return high_water
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def anonymous_bytes() -> int | None:
    """Return the RAM of this process that cannot be dropped without swapping: the resident set less mapped files.

    Pages of a mapped checkpoint count as resident, though the system takes them back whenever it likes. None on systems
    that do not tell the two apart.
    """
    return _status_bytes("RssAnon")


class Peak(threading.Thread):
    """Samples a number of bytes while it runs; ``peak`` is the largest, ``begun`` the first, None if it has none."""

    def __init__(self, read: Callable[[], int | None], interval: float = 0.05) -> None:
        super().__init__(daemon=True)
        self.begun = self.peak = read()
        self._read = read
        self._interval = interval
        self._done = threading.Event()

    def run(self) -> None:
        while self.peak is not None and not self._done.wait(self._interval):
            self.peak = max(self.peak, self._read() or 0)

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()
