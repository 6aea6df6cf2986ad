"""A file that appears under its name only when it is complete.

It is written beside its target, so that the last step is a rename within one file system. What a killed process leaves
behind is recognised by a lock that died with it, and removed by `sweep`. Whatever else lies where a sweep looks stays
there and stops nothing. Several processes may write and sweep in the same folders.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
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
# Of renameat2: relative to the working folder, and never over another file.
AT_FDCWD, RENAME_NOREPLACE = -100, 1
NUMBER = re.compile(r"(\d+)(_?\.\w+)$")


class PartialFile:
    """A new file for `target`, empty and open for writing (`file`, unbuffered).

    overwrite: replace what is there when this one is complete; else FileExistsError, then and at once. counted: the
    name ends with a number. Where another file has that name when this one is complete, it takes the next free number,
    and `target` is then that name. journal: a folder in which an unfinished file is noted, so that `sweep_noted` finds
    it in any folder; where it cannot be written to, a file that a kill leaves behind stays. Raises OSError where the
    target's folder cannot be written to.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        counted: bool = False,
        journal: Path | None = None,
    ) -> None:
        self.target = Path(os.path.abspath(target))
        self.overwrite = overwrite
        self.counted = counted and NUMBER.search(self.target.name) is not None
        self._note: _Note | None = None
        self._refuse_existing()
        while True:
            token = secrets.token_hex(8)
            self.path = self.target.parent / f"{PREFIX}{token}{SUFFIX}"
            # Noted before the file exists. A kill in between leaves a note of no file, where the other way round the
            # file would stay for ever.
            self._note = _write_note(journal, token, self.path) if journal is not None else None
            try:
                file = _new_locked(self.path)
            except BaseException:
                self._forget()
                raise
            if file is not None:
                self.file = file
                return
            self._forget()

    def commit(self) -> None:
        """Bring the data to the disk and give the file its name."""
        os.fsync(self.file.fileno())
        if sys.platform == "win32":
            self.file.close()  # an open file cannot be renamed there; elsewhere its lock must outlast the rename
        if self.overwrite:
            os.replace(self.path, self.target)
        else:
            self._take_a_name()
        self.file.close()
        sync_folder(self.target.parent)
        self._forget()

    def _take_a_name(self) -> None:
        while True:
            try:
                _rename_new(self.path, self.target)
                return
            except FileExistsError:
                if not self.counted:
                    raise
            self.target = _next_number(self.target)

    def discard(self) -> None:
        """Remove the file. A file under the target's name stays as it was."""
        self.file.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self._forget()

    def _refuse_existing(self) -> None:
        if not self.overwrite and not self.counted and os.path.lexists(self.target):
            raise _exists(self.target)

    def _forget(self) -> None:
        if self._note is not None:
            self._note.remove()


class _Note:
    """A note of an unfinished file. It is locked for as long as its writer lives."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file

    def remove(self) -> None:
        if sys.platform == "win32":
            self._file.close()  # an open file cannot be removed there
        _unlink(self._path)
        self._file.close()


def _write_note(journal: Path, token: str, path: Path) -> _Note | None:
    """Note an unfinished file. Return None where it cannot be noted, which prevents no save."""
    note = journal / token
    try:
        journal.mkdir(parents=True, exist_ok=True)
        while (file := _new_locked(note)) is None:
            pass
        file.write(os.fsencode(path))
        return _Note(note, file)
    except OSError as error:
        log.warning("[Spillway] %s cannot be noted as unfinished (%s): if ComfyUI is killed, it stays.", path, error)
        _unlink(note)
        return None


def _unlink(note: Path) -> None:
    with contextlib.suppress(OSError):  # a note too many does no harm
        note.unlink()


def _new_locked(path: Path) -> BinaryIO | None:
    """Create a file and lock it. Return None where a sweep of another process came in between and has removed it."""
    file: BinaryIO = open(path, "xb", buffering=0)  # type: ignore[assignment]  # noqa: SIM115
    # On Windows an open file cannot be removed, which serves as the lock.
    if sys.platform == "win32":
        return file
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # the sweep removes it in this moment
        file.close()
        return None
    except OSError:  # a file system without locks
        return file
    # From here on no sweep can lock it, and so none removes it.
    if os.path.lexists(path):
        return file
    file.close()
    return None


def _next_number(target: Path) -> Path:
    """Return the name with the next number: model_00009_.safetensors -> model_00010_.safetensors."""

    def following(found: re.Match[str]) -> str:
        digits, end = found.groups()
        return f"{int(digits) + 1:0{len(digits)}}{end}"

    return target.with_name(NUMBER.sub(following, target.name))


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
        _rename_without_links(path, target)


def _rename_without_links(path: Path, target: Path) -> None:
    """Rename where the file system has no hard links, such as exFAT."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux, for most of its file systems
    if rename is not None:
        if not rename(AT_FDCWD, os.fsencode(path), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE):
            return
        if ctypes.get_errno() == errno.EEXIST:
            raise _exists(target)
    if os.path.lexists(target):
        raise _exists(target)
    os.rename(path, target)


def _exists(target: Path) -> FileExistsError:
    return FileExistsError(f"{target} exists already; it was left as it is.")


def sync_folder(folder: Path) -> None:
    """Bring the new name to the disk, so that it survives a power failure."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):  # not every file system can, and not every folder may be read
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _abandoned(path: Path) -> bool:
    """Remove an unfinished file unless a living process writes it. Say whether it is gone."""
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
    """Open a regular file for reading. Raises OSError for anything else, since opening a pipe would wait for ever."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.EINVAL, "no plain file", str(path))
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        yield handle
    finally:
        os.close(handle)


def sweep(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove the unfinished files of dead processes from a folder. Return them."""
    with contextlib.suppress(OSError):
        return list(_swept(Path(folder) / name for name in os.listdir(folder)))
    return []


def sweep_noted(journal: Path) -> list[Path]:
    """Remove the unfinished files of dead processes that a journal notes, wherever they lie. Return them."""
    try:
        names = sorted(os.listdir(journal))
    except OSError:  # there is none, or it is no folder
        return []
    removed = []
    for name in names:
        with contextlib.suppress(OSError, ValueError):  # no note (a folder, a link, a large file), or unreadable
            removed += _follow_note(journal / name)
    return removed


def _follow_note(note: Path) -> list[Path]:
    """Remove the unfinished file of a dead process that a note names, and the note. Return what was removed.

    Raises OSError or ValueError for a file that is no note.
    """
    with _opened(note) as handle:
        if _is_held(handle):  # its writer lives, and may not have made the file yet
            return []
        path = _read_note(handle)
        existed = os.path.lexists(path)
        done = not _is_ours(path) or _abandoned(path)
        if done:
            _unlink(note)
    if done and sys.platform == "win32":  # now that it is closed
        _unlink(note)
    return [path] if done and existed and _is_ours(path) else []


def _is_held(handle: int) -> bool:
    """Say whether another process has locked a file. Lock it otherwise, where its file system has locks."""
    if sys.platform != "win32":
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
    return False


def _read_note(handle: int) -> Path:
    """Return the path that a note holds. Raises ValueError for a file that is no note."""
    data = os.read(handle, MAX_NOTE_BYTES + 1)
    if len(data) > MAX_NOTE_BYTES:
        raise ValueError("too large for a note")
    return Path(os.fsdecode(data))


def _is_ours(path: Path) -> bool:
    return path.name.startswith(PREFIX) and path.name.endswith(SUFFIX)


def _swept(paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in paths if _is_ours(path) and _abandoned(path))
