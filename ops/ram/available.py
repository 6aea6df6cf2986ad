"""The RAM that this process can really have."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from .. import settings
from ..ledger import in_words
from . import cgroup

GIB = 1 << 30
# Shares of the last ten seconds in which a task waited for memory. From the first on, only a part of the available
# memory can be had without waiting; from the second on, none.
PRESSURE_BEGINS, PRESSURE_FULL = 0.10, 0.40


@dataclass(frozen=True)
class Available:
    """available: bytes that can be had. total: bytes in all. reason: the limit of them, in words."""

    available: int
    total: int
    reason: str


def available_ram(root: Path = Path("/")) -> Available:
    """Return the least that host memory, cgroups, memory pressure, the commit limit and SPILLWAY_RAM_GB allow.

    root: where /proc and the mounted file systems are looked for.
    """
    group = cgroup.tightest(root) if sys.platform == "linux" else None
    least = min(_limits(group), key=lambda limit: limit.available)
    stalled = memory_stall(root, group) if sys.platform == "linux" else 0.0
    if stalled > PRESSURE_BEGINS:
        left = max(0.0, 1 - (stalled - PRESSURE_BEGINS) / (PRESSURE_FULL - PRESSURE_BEGINS))
        reason = f"{least.reason}, and tasks waited for memory {stalled:.0%} of the last ten seconds"
        return Available(int(least.available * left), least.total, reason)
    return least


def total_ram(root: Path = Path("/")) -> int:
    """Return the bytes that this process may have in all: the least that machine, cgroup and SPILLWAY_RAM_GB allow.

    root: as for `available_ram`.
    """
    return min(limit.total for limit in _limits(cgroup.tightest(root) if sys.platform == "linux" else None))


def _limits(group: cgroup.Group | None) -> list[Available]:
    memory = psutil.virtual_memory()
    limits = [Available(memory.available, memory.total, "the host's memory")]
    if sys.platform == "win32":
        commit = commit_limit()
        if commit is not None:
            limits.append(Available(*commit, "Windows' commit limit"))
    if group is not None and group.limit < memory.total:
        limits.append(Available(group.available, group.limit, f"the memory limit of cgroup {group.path}"))
    limit = limit_of_variable()
    if limit is not None:
        rest = max(0, limit - process_bytes())
        limits.append(Available(rest, limit, f"{settings.RAM_GB.name}, {in_words(limit)}"))
    return limits


def limit_of_variable() -> int | None:
    """Return the bytes that SPILLWAY_RAM_GB allows this process; None where it is not set, or makes no sense."""
    gigabytes = settings.variable(settings.RAM_GB)
    return None if gigabytes is None else int(gigabytes * GIB)


def process_bytes() -> int:
    """Return the bytes that this process holds and no file holds for it."""
    info = psutil.Process().memory_info()
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
