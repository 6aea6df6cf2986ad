"""A file that appears under its name only when it is complete.

It is written beside its target, so that the last step is a rename within one file system. What a killed process leaves
behind is recognised by a lock that died with it, and removed by `sweep`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

PREFIX, SUFFIX = ".spillway-", ".partial"


class PartialFile:
    """A new file for `target`, empty and open for writing (`file`, unbuffered).

    overwrite: replace what is there when this one is complete; else FileExistsError, then and at once. journal: a
    folder in which an unfinished file is noted, so that `sweep_noted` finds it in any folder. Raises OSError where
    the target's folder cannot be written to.
    """

    def __init__(self, target: str | os.PathLike[str], *, overwrite: bool = False, journal: Path | None = None) -> None:
        self.target = Path(os.path.abspath(target))
        self.overwrite = overwrite
        self._refuse_existing()
        token = secrets.token_hex(8)
        self.path = self.target.parent / f"{PREFIX}{token}{SUFFIX}"
        # Noted before it exists: a kill in between leaves a note of nothing.
        self._note = journal / token if journal is not None else None
        if self._note is not None:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            self._note.write_text(str(self.path), encoding="utf-8")
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
            self._note.unlink(missing_ok=True)


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
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system can
            os.fsync(handle)
    finally:
        os.close(handle)


def _abandoned(path: Path) -> bool:
    """Remove an unfinished file unless a living process writes it. Returns whether it is gone."""
    try:
        if sys.platform == "win32":
            path.unlink()
            return True
        with open(path, "rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        return True
    except FileNotFoundError:
        return True
    except OSError:
        return False


def sweep(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove the unfinished files of dead processes from a folder; returns them."""
    with contextlib.suppress(OSError):
        return list(_swept(Path(folder) / name for name in os.listdir(folder)))
    return []


def sweep_noted(journal: Path) -> list[Path]:
    """Remove the unfinished files of dead processes that a journal notes, wherever they lie; returns them."""
    removed = []
    for note in sorted(journal.iterdir()) if journal.is_dir() else []:
        path = Path(note.read_text(encoding="utf-8"))
        existed = path.exists()
        if not _is_ours(path) or _abandoned(path):
            note.unlink(missing_ok=True)
            removed += [path] if existed and _is_ours(path) else []
    return removed


def _is_ours(path: Path) -> bool:
    return path.name.startswith(PREFIX) and path.name.endswith(SUFFIX)


def _swept(paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in paths if _is_ours(path) and _abandoned(path))
