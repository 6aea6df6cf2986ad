"""How much RAM a process took at its peak, as the operating system counts it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")


def _status_bytes(field: str) -> int | None:
    """A field of the kernel's account of this process, in bytes; None where there is no such account."""
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def peak_rss() -> int:
    """Peak resident set size of this process in bytes, mapped file pages included."""
    # getrusage on Linux also remembers the process that started this one, so the kernel's own mark comes first.
    high_water = _status_bytes("VmHWM")
    if high_water is not None:
        return high_water
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class AnonymousPeak(threading.Thread):
    """Samples the RAM that cannot be dropped without swapping: the resident set less mapped files.

    Pages of a mapped checkpoint count as resident, though the system takes them back whenever it likes. ``peak`` is the
    most seen in bytes while the thread ran, or None on systems that do not tell the two apart.
    """

    def __init__(self, interval: float = 0.05) -> None:
        super().__init__(daemon=True)
        self.peak: int | None = _status_bytes("RssAnon")
        self._interval = interval
        self._done = threading.Event()

    def run(self) -> None:
        while self.peak is not None and not self._done.wait(self._interval):
            self.peak = max(self.peak, _status_bytes("RssAnon") or 0)

    def __enter__(self) -> AnonymousPeak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()
