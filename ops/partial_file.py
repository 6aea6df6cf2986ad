"""A file that appears under its name only when it is complete.

It is written beside its target, so that the last step is a rename within one file system. What a killed process leaves
behind is recognised by a lock that died with it, and removed by `sweep`. Whatever else lies where a sweep looks stays
there and stops nothing.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("spillway")

PREFIX, SUFFIX = ".spillway-", ".partial"
# No system has longer paths.
MAX_NOTE_BYTES = 128 << 10
# No file can be under such a path.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


class PartialFile:
    """A new file for `target`, empty and open for writing (`file`, unbuffered).

    overwrite: replace what is there when this one is complete; else FileExistsError, then and at once. journal: a
    folder in which an unfinished file is noted, so that `sweep_noted` finds it in any folder; where it cannot be
    written to, a file that a kill leaves behind stays. Raises OSError where the target's folder cannot be written to.
    """

    def __init__(self, target: str | os.PathLike[str], *, overwrite: bool = False, journal: Path | None = None) -> None:
        self.target = Path(os.path.abspath(target))
        self.overwrite = overwrite
        self._refuse_existing()
        token = secrets.token_hex(8)
        self.path = self.target.parent / f"{PREFIX}{token}{SUFFIX}"
        # Noted before it exists: a kill in between leaves a note of nothing.
        self._note = _write_note(journal / token, self.path) if journal is not None else None
        self.file: BinaryIO
        try:
            self.file = open(self.path, "xb", buffering=0)  # type: ignore[assignment]  # noqa: SIM115
            _lock(self.file)
        except BaseException:
            self._forget()
            raise

    def commit(self) -> None:
        """Bring the data to the disk and give the file its name."""
        os.fsync(self.file.fileno())
        if sys.platform == "win32":
            self.file.close()  # an open file cannot be renamed there; elsewhere its lock must outlast the rename
        if self.overwrite:
            os.replace(self.path, self.target)
        else:
            _rename_new(self.path, self.target)
        self.file.close()
        _sync_folder(self.target.parent)
        self._forget()

    def discard(self) -> None:
        """Remove what was written. What stood under the target's name still does."""
        if hasattr(self, "file"):
            self.file.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self._forget()

    def _refuse_existing(self) -> None:
        if not self.overwrite and os.path.lexists(self.target):
            raise _exists(self.target)

    def _forget(self) -> None:
        if self._note is not None:
            _unlink(self._note)


def _write_note(note: Path, path: Path) -> Path | None:
    """Note an unfinished file; None where it cannot be noted, which prevents no save."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_bytes(os.fsencode(path))
    except OSError as error:
        log.warning("[Spillway] %s cannot be noted as unfinished (%s): if ComfyUI is killed, it stays.", path, error)
        _unlink(note)
        return None
    return note


def _unlink(note: Path) -> None:
    with contextlib.suppress(OSError):  # a note too many does no harm
        note.unlink()


def _lock(file: BinaryIO) -> None:
    # On Windows an open file cannot be removed, which serves as the lock.
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _rename_new(path: Path, target: Path) -> None:
    """Rename, but never over another file."""
    try:
        if sys.platform == "win32":
            os.rename(path, target)  # refuses an existing target
        else:
            os.link(path, target)
            path.unlink()
    except FileExistsError:
        raise _exists(target) from None
    except OSError:
        if sys.platform == "win32":
            raise
        if os.path.lexists(target):
            raise _exists(target) from None
        os.rename(path, target)  # a file system without hard links


def _exists(target: Path) -> FileExistsError:
    return FileExistsError(f"{target} exists already; it was left as it is.")


def _sync_folder(folder: Path) -> None:
    """The name must survive a power failure too."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):  # not every file system can, and not every folder may be read
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _abandoned(path: Path) -> bool:
    """Remove an unfinished file unless a living process writes it. Returns whether it is gone."""
    try:
        if sys.platform == "win32":
            path.unlink()
            return True
        with _opened(path) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        return True
    except ValueError:  # no path at all
        return True
    except OSError as error:
        return error.errno in NO_FILE


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A plain file, open for reading. Raises OSError for anything else: a pipe, say, would be waited for."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.EINVAL, "no plain file", str(path))
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        yield handle
    finally:
        os.close(handle)


def sweep(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove the unfinished files of dead processes from a folder; returns them."""
    with contextlib.suppress(OSError):
        return list(_swept(Path(folder) / name for name in os.listdir(folder)))
    return []


def sweep_noted(journal: Path) -> list[Path]:
    """Remove the unfinished files of dead processes that a journal notes, wherever they lie; returns them."""
    removed = []
    try:
        names = sorted(os.listdir(journal))
    except OSError:  # there is none, or it is no folder
        return []
    for note in (journal / name for name in names):
        try:
            path = _read_note(note)
        except (OSError, ValueError):  # no note: a folder, a link, something large; or it cannot be read
            continue
        existed = os.path.lexists(path)
        if not _is_ours(path) or _abandoned(path):
            _unlink(note)
            removed += [path] if existed and _is_ours(path) else []
    return removed


def _read_note(note: Path) -> Path:
    """The path that a note holds. Raises OSError or ValueError for what is no note."""
    with _opened(note) as handle:
        data = os.read(handle, MAX_NOTE_BYTES + 1)
    if len(data) > MAX_NOTE_BYTES:
        raise ValueError(f"{note} is too large for a note")
    return Path(os.fsdecode(data))


def _is_ours(path: Path) -> bool:
    return path.name.startswith(PREFIX) and path.name.endswith(SUFFIX)


def _swept(paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in paths if _is_ours(path) and _abandoned(path))
