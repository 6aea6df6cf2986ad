"""A memory limit around a process of its own: a control group where this machine lets one be made."""

import contextlib
import os
import time
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
# (folder of the memory controller, its file for the limit, its file for the limit of memory and swap or of swap)
VERSIONS = (
    (CGROUPS / "memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    (CGROUPS, "memory.max", "memory.swap.max"),
)
ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


@contextlib.contextmanager
def control_group(nbytes):
    """Yield a control group whose processes may have `nbytes`; None where none can be made."""
    folder = None
    for top, limit, swap in VERSIONS:
        made = top / f"spillway-test-{os.getpid()}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            (made / limit).write_text(str(nbytes))
            with contextlib.suppress(OSError):  # a kernel that does not count swap
                (made / swap).write_text(str(nbytes if limit != "memory.max" else 0))
        except OSError:
            made.rmdir()
            continue
        folder = made
        break
    try:
        yield folder
    finally:
        if folder is not None:
            _remove(folder)


def _remove(folder):
    end = time.monotonic() + 10
    while True:
        try:
            folder.rmdir()
            return
        except OSError:  # a process that ended a moment ago
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def inside(folder, command):
    """Return the command that runs `command` in a control group; the command itself for None."""
    return list(command) if folder is None else ["sh", "-c", ENTER, str(folder), *map(str, command)]


def killed_in(folder):
    """Count the processes that the system killed in a control group for want of memory."""
    for name in ("memory.events", "memory.oom_control"):
        path = folder / name
        if path.exists():
            fields = dict(line.split() for line in path.read_text().splitlines())
            return int(fields.get("oom_kill", 0))
    return 0
