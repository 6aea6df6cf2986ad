"""Keeps evicted outputs on disk, in a folder that several processes may share.

An entry is one file, which a later process finds again by name. It is complete or not there, and counts only when its
hashes are right and were made for that name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from ..ops.files import partial_file
from ..ops.files.partial_file import PartialFile
from ..ops.ledger import Ledger, in_words
from .disk_format import Description, NotStorable, Stopped, describe, opened, read_outputs, read_record, write

SUFFIX = ".output"
# Bytes that stay free on the disk for other programs.
KEEP_FREE = 1 << 30
# Failures in a row after which nothing is written any more until the next start.
PATIENCE = 3


class DiskTier:
    """A folder of evicted outputs under a cap in bytes. A failure is logged once and never raised.

    least_seconds: outputs that took less to make are not worth a file. room: tells how much RAM may be taken.
    """

    def __init__(
        self,
        folder: Path,
        cap: int,
        least_seconds: float,
        ledger: Ledger,
        room: Callable[[], int] = lambda: 1 << 62,
    ) -> None:
        self.folder = folder
        self.cap = cap
        self.least_seconds = least_seconds
        self.ledger = ledger
        self.room = room
        self._failures = 0

    @property
    def waiting_cap(self) -> int:
        """The most bytes that may wait to be written."""
        return self.cap

    def path(self, name: str) -> Path:
        """Return the file of an entry."""
        return self.folder / f"{name}{SUFFIX}"

    # -- writing

    def store(
        self,
        name: str,
        outputs: Any,
        *,
        seconds: float,
        kind: str,
        stamps: Any = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Write outputs under a name. Returns whether they are there now.

        stamps: JSON data, for `load` to judge by. stop: is asked again and again whether to give the writing up.
        """
        if self._failures >= PATIENCE or seconds < self.least_seconds:
            return False
        if self._has(name, stamps):
            return True
        try:
            found = describe(outputs)
            if not self._has_room(found):
                return False
            about = {"name": name, "kind": kind, "seconds": seconds, "stamps": stamps}
            partial = PartialFile(self.path(name), overwrite=True)
            try:
                # Other processes count the whole of it from now on.
                partial.file.truncate(found.nbytes)
                write(partial.file, found, about, stop)
                partial.commit()
            except BaseException:
                partial.discard()
                raise
            self._make_room(0)
        except (NotStorable, Stopped):
            return False
        except Exception as error:
            self._failures += 1
            self.ledger.decide_once(f"disk tier: {self.folder} cannot be written ({error}): outputs are lost instead.")
            return False
        self._failures = 0
        self.ledger.decide(f"disk tier: wrote {kind}, {in_words(found.nbytes)}, which took {seconds:.1f} s to make")
        return True

    def _has(self, name: str, stamps: Any) -> bool:
        try:
            with opened(self.path(name)) as file:
                return bool(read_record(file, name).stamps == stamps)
        except (OSError, ValueError):  # there is none, or it is damaged
            return False

    def _has_room(self, found: Description) -> bool:
        nbytes = found.nbytes
        if nbytes > self.cap or found.copied > self.room():
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(nbytes)
        free = shutil.disk_usage(self.folder).free
        if free < nbytes + KEEP_FREE:
            self.ledger.decide_once(f"disk tier: only {in_words(free)} are free on the disk; nothing more is written.")
            return False
        return True

    def _make_room(self, nbytes: int) -> None:
        """Delete the entries that were not used for longest, until `nbytes` more stay under the cap."""
        files = self._files()
        held = sum(size for _, _, size in files)
        for path, _, size in sorted(files, key=lambda file: file[1]):
            if held + nbytes <= self.cap:
                break
            # What is being written counts too. What a dead process was writing is removed at the next start.
            if path.endswith(SUFFIX):
                self._discard(path)
                held -= size

    def _files(self) -> list[tuple[str, float, int]]:
        """List (path, last use, bytes) of all entries in the folder, and of those that are being written."""
        files = []
        with os.scandir(self.folder) as found:
            for file in found:
                ours = file.name.startswith(partial_file.PREFIX) and file.name.endswith(partial_file.SUFFIX)
                with contextlib.suppress(FileNotFoundError):  # another process has just evicted it
                    if (ours or file.name.endswith(SUFFIX)) and file.is_file(follow_symlinks=False):
                        state = file.stat(follow_symlinks=False)
                        files.append((file.path, state.st_mtime, state.st_size))
        return files

    # -- reading

    def load(self, name: str, holds: Callable[[Any], bool] = lambda _: True) -> tuple[Any, float, Any] | None:
        """Read (outputs, seconds they took to make, stamps). Returns None where there are none.

        holds: says whether stamps still hold. Damaged entries, and those whose stamps do not hold, are deleted.
        """
        path = self.path(name)
        try:
            with opened(path) as file:
                record = read_record(file, name)
                if not holds(record.stamps):
                    self.ledger.decide(f"disk tier: what {record.kind} was made from has changed: it is made again")
                    self._discard(path)
                    return None
                if record.nbytes > self.room():
                    self.ledger.decide(
                        f"disk tier: {record.kind} is made again: its {in_words(record.nbytes)} are more than is free"
                    )
                    return None
                outputs = read_outputs(file, record)
        except FileNotFoundError:
            return None
        except OSError as error:  # it may be whole, and readable another time
            self.ledger.decide_once(f"disk tier: {path.name} cannot be read ({error}): it is made again")
            return None
        except Exception as error:  # however it is damaged, the node makes it again
            self.ledger.decide(f"disk tier: {path.name} is damaged ({error}): ignored")
            self._discard(path)
            return None
        with contextlib.suppress(OSError):  # a read-only folder keeps no time of use, and can still be read
            os.utime(path)
        return outputs, record.seconds, record.stamps

    def _discard(self, path: str | Path) -> None:
        with contextlib.suppress(OSError):  # in a read-only folder it stays, and is ignored again
            os.unlink(path)


def name_of(key: Hashable, salt: Any, instead: Callable[[str], Any] = lambda _: None) -> str | None:
    """Return a file name for a key, the same in every process. None for keys that another process cannot make.

    salt: JSON data that must be the same too, such as versions. instead: gives JSON data that stands for a text of the
    key, or None for the text itself.
    """
    try:
        text = json.dumps([_canonical(key, instead), salt], sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any, instead: Callable[[str], Any]) -> Any:
    if isinstance(value, str) and (found := instead(value)) is not None:
        return ["instead", found]
    if value is None or isinstance(value, bool | int | float | str):
        return [type(value).__name__, value]
    if isinstance(value, tuple | list):
        return ["sequence", [_canonical(item, instead) for item in value]]
    if isinstance(value, frozenset):
        return ["set", sorted((_canonical(item, instead) for item in value), key=json.dumps)]
    raise TypeError(f"a {type(value).__name__} in a key")
