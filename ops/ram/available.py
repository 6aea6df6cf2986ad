"""The RAM that this process can really have. Whoever decides by the RAM asks here."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from .. import settings
from ..ledger import in_words
from . import cgroup
from .process_limits import process_limits

GIB = 1 << 30
# Asking takes up to a millisecond where there are cgroups.
RECENT_SECONDS = 0.02
# Linux counts the pages of mapped files as available also while they are in use. Elsewhere those in use are not.
COUNTS_MAPPED_FILES = sys.platform == "linux"
# Shares of the last ten seconds in which a task waited for memory. From the first on, only a part of the available
# memory can be had without waiting; from the second on, none.
PRESSURE_BEGINS, PRESSURE_FULL = 0.10, 0.40


@dataclass(frozen=True)
class Available:
    """available: bytes that can be had. total: bytes in all. reason: the limit of them, in words.

    remedy: what a user can do about the limit. of_machine: whether it is the machine's memory itself.
    kind: which limit, for who words it in another language: machine, commit, process, cgroup or variable.
    stalled: the share of the last ten seconds in which tasks waited for memory, where that made it less.
    """

    available: int
    total: int
    reason: str
    remedy: str = "Close other programs, or choose a smaller model."
    of_machine: bool = field(default=False, compare=False)
    kind: str = field(default="process", compare=False)
    stalled: float = field(default=0.0, compare=False)

    def in_words(self) -> str:
        """Word what is free, and of which limit unless it is the machine's memory."""
        return f"{in_words(self.available)} free" + ("" if self.of_machine else f" of {self.reason}")


def available_ram(root: Path = Path("/")) -> Available:
    """Return the least that memory, cgroups, pressure, the limits of process and system and SPILLWAY_RAM_GB allow.

    Pages of files count as available, also those of weights that are used where they lie: the system takes them back
    when memory is asked for. root: where /proc and the mounted file systems are looked for.
    """
    group = cgroup.tightest(root) if sys.platform == "linux" else None
    least = min(_limits(group), key=lambda limit: limit.available)
    stalled = memory_stall(root, group) if sys.platform == "linux" else 0.0
    if stalled > PRESSURE_BEGINS:
        left = max(0.0, 1 - (stalled - PRESSURE_BEGINS) / (PRESSURE_FULL - PRESSURE_BEGINS))
        reason = f"{least.reason}, and tasks waited for memory {stalled:.0%} of the last ten seconds"
        return Available(
            int(least.available * left), least.total, reason, least.remedy, kind=least.kind, stalled=stalled
        )
    return least


def unused_ram(root: Path = Path("/")) -> int:
    """Return the bytes of RAM that hold nothing, not even pages of a file. root: as for `available_ram`."""
    group = cgroup.tightest(root) if sys.platform == "linux" else None
    free = int(psutil.virtual_memory().free)
    return free if group is None else max(0, min(free, group.limit - group.used))


_recent: tuple[float, Available] = (-RECENT_SECONDS, Available(0, 0, ""))


def recent_ram() -> Available:
    """Return what `available_ram` said at most RECENT_SECONDS ago, for callers that ask several times a step."""
    global _recent
    now = time.monotonic()
    if now - _recent[0] >= RECENT_SECONDS:
        _recent = now, available_ram()
    return _recent[1]


def total_ram(root: Path = Path("/")) -> int:
    """Return the bytes that this process may have in all: the least that machine, cgroup and SPILLWAY_RAM_GB allow.

    root: as for `available_ram`.
    """
    return min(limit.total for limit in _limits(cgroup.tightest(root) if sys.platform == "linux" else None))


def refusing_limit() -> Available:
    """Return the tightest of the limits beyond which an allocation fails. A cgroup's ends the process instead."""
    return min(_limits_that_refuse(), key=lambda limit: limit.available)


def _limits_that_refuse() -> list[Available]:
    memory = psutil.virtual_memory()
    words = f"the machine's {in_words(memory.total)}"
    limits = [Available(memory.available, memory.total, words, of_machine=True, kind="machine")]
    if sys.platform == "win32":
        commit = commit_limit()
        if commit is not None:
            remedy = "Enlarge the page file, or close other programs."
            words = f"Windows' commit limit of {in_words(commit[1])}"
            limits.append(Available(*commit, words, remedy, kind="commit"))
    for limit in process_limits():
        remedy = f"Start ComfyUI with a higher `ulimit {limit.option}`, or choose a smaller model."
        limits.append(Available(limit.available, limit.limit, f"{limit.name} of {in_words(limit.limit)}", remedy))
    return limits


def _limits(group: cgroup.Group | None) -> list[Available]:
    limits = _limits_that_refuse()
    if group is not None and group.limit < limits[0].total:
        remedy = "Give the container more memory, or choose a smaller model."
        words = f"the cgroup's limit of {in_words(group.limit)}"
        limits.append(Available(group.available, group.limit, words, remedy, kind="cgroup"))
    limit = limit_of_variable()
    if limit is not None:
        rest = max(0, limit - process_bytes())
        words, remedy = f"{settings.RAM_GB.name} of {in_words(limit)}", f"Set a higher {settings.RAM_GB.name}."
        limits.append(Available(rest, limit, words, remedy, kind="variable"))
    return limits


def limit_of_variable() -> int | None:
    """Return the bytes that SPILLWAY_RAM_GB allows this process; None where it is not set, or makes no sense."""
    gigabytes = settings.variable(settings.RAM_GB)
    return None if gigabytes is None else int(gigabytes * GIB)


def this_process() -> psutil.Process:
    """Return the handle of this process. To make one reads its files in /proc, each time."""
    return _process_of(os.getpid())


@functools.lru_cache(maxsize=1)
def _process_of(pid: int) -> psutil.Process:
    return psutil.Process(pid)


def process_bytes() -> int:
    """Return the bytes that this process holds and no file holds for it."""
    info = this_process().memory_info()
    return max(0, info.rss - getattr(info, "shared", 0))  # Linux: `shared` counts the pages of mapped files


def memory_stall(root: Path = Path("/"), group: cgroup.Group | None = None) -> float:
    """Return the share of the last ten seconds that a task waited for memory (PSI, avg10); 0 where the kernel has none.

    group: asked before the whole system.
    """
    paths = [Path(group.path) / "memory.pressure"] if group is not None else []
    for path in (*paths, root / "proc/pressure/memory"):
        try:
            text = path.read_text(encoding="ascii")
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith("some "):
                fields = dict(field.partition("=")[::2] for field in line.split()[1:])
                return float(fields.get("avg10", 0)) / 100
    return 0.0


SIZES = ("phys", "avail_phys", "page", "avail_page", "virtual", "avail_virtual", "avail_extended")


class _MemoryStatus(ctypes.Structure):
    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_ulonglong) for name in SIZES),
    ]


def commit_limit() -> tuple[int, int] | None:
    """Return Windows' (bytes that can still be committed, commit limit); None elsewhere and where unreadable."""
    windll = getattr(ctypes, "windll", None)
    if windll is None:
        return None
    status = _MemoryStatus()
    status.length = ctypes.sizeof(status)
    if not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.avail_page), int(status.page)
