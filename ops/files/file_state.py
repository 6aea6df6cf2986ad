"""Says which file lies under a path, as a text by which nodes are told that it is another one."""

from __future__ import annotations

import os

# So begins such a text. It holds on this machine alone. Whoever compares machines looks at the file's content.
MARK = "state of a file: "


def file_state(path: str | os.PathLike[str]) -> str:
    """Return the text for a file, '' where there is none.

    Its size and the time of its content can be those of the file before. The time of its last change cannot be set.
    """
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{MARK}{status.st_size} {status.st_mtime_ns} {status.st_ino} {status.st_ctime_ns}"
