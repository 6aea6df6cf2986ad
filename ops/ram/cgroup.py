"""Limits that the system puts on a group of processes: cgroups of version 1 and 2 on Linux."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# Version 1 says "no limit" by a number near 2**63, rounded to pages.
NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Group:
    """One control group that limits memory. limit, used: bytes. reclaimable: bytes of `used` that are file cache."""

    path: str
    limit: int
    used: int
    reclaimable: int

    @property
    def available(self) -> int:
        """Return the bytes that its processes can still take before the system must kill one."""
        return max(0, self.limit - self.used + self.reclaimable)


def tightest(root: Path = Path("/")) -> Group | None:
    """Return the group around this process with the least memory available, or None where nothing limits it.

    root: where /proc and the mounted file systems are looked for.
    """
    groups = [group for folder in folders(root) if (group := read(folder)) is not None]
    return min(groups, key=lambda group: group.available, default=None)


@lru_cache(maxsize=4)
def folders(root: Path = Path("/")) -> list[Path]:
    """Return the memory controller's folders that this process is in, the innermost first, of both versions.

    They are looked for once, since a process is moved between groups when it starts, if ever.
    """
    found: list[Path] = []
    try:
        memberships = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = {}
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for line in mounts:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in paths:
            continue
        if kind[0] == "cgroup" and "memory" not in kind[2].split(","):
            continue
        mounted = root / _unescape(fields[4]).lstrip("/")
        # In a container the mount shows a part of the tree, while the path may be told from the top of it.
        inside = posixpath.relpath(paths[kind[0]], _unescape(fields[3]))
        folder = mounted if inside.startswith("..") else mounted / inside
        if not folder.is_dir():
            folder = mounted
        while True:
            found.append(folder)
            if folder == mounted:
                break
            folder = folder.parent
    return found


def _unescape(path: str) -> str:
    return path.replace("\\040", " ")


def read(folder: Path) -> Group | None:
    """Return the memory figures of a group; None where it has no limit that can be read."""
    return _read_v2(folder) or _read_v1(folder)


def _read_v2(folder: Path) -> Group | None:
    # Above `high` the system already stalls the group's processes to reclaim memory.
    limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
    limit = min((value for value in limits if value is not None), default=None)
    used = _number(folder / "memory.current")
    if limit is None or used is None:
        return None
    stat = _stat(folder)
    # All of it, as in the kernel's own MemAvailable: weights that are used where they lie in their file are among the
    # pages that were read lately, and the kernel takes them back rather than to refuse memory.
    file_cache = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    return Group(str(folder), limit, used, file_cache + stat.get("slab_reclaimable", 0))


def _read_v1(folder: Path) -> Group | None:
    limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= NO_LIMIT:
        return None
    stat = _stat(folder)
    return Group(str(folder), limit, used, stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
        return int(text)
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _stat(folder: Path) -> dict[str, int]:
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
