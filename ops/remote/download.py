"""Brings a file that lies elsewhere, block by block, into a sparse file that is used meanwhile.

What has come outlives the process: see `block_record`. The file gets its name when it is whole and on the disk.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..files.coming_file import ComingFile, forget
from ..files.partial_file import sync_folder
from ..files.safetensors_header import SourceError
from ..files.watched_file import stamp
from .block_record import BlockRecord
from .order import Order
from .pace import Pace, Speed
from .store import Changed, State, Store, Unreachable

log = logging.getLogger("spillway")

THREADS = 4
# Bytes of one request. It is made longer where it takes less than QUICK seconds, and shorter where it takes more than
# SLOW, so that what is asked for meanwhile need not wait for long.
MOST_BYTES = 16 << 20
QUICK, SLOW = 0.5, 2.0
# Seconds to wait before each further try of a range that could not be brought.
PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
# Seconds of a download that a power failure or a kill may cost.
SAVE_EVERY = 1.0
# The part of a file after which the log says how far it is.
SAY_EVERY = 0.1


class Download:
    """The threads that bring one file. file: the sparse file, open and locked; record: see `block_record`."""

    def __init__(
        self,
        store: Store,
        state: State,
        coming: ComingFile,
        file: BinaryIO,
        record: BlockRecord,
        record_path: Path,
        address: str,
        pauses: Sequence[float] = PAUSES,
    ) -> None:
        self.address = address
        self.store, self.state, self.coming, self.pauses = store, state, coming, pauses
        self._file, self._record, self._record_path = file, record, record_path
        self._order = Order(coming)
        self._writing, self._saving = threading.Lock(), threading.Lock()
        self._threads: list[threading.Thread] = []
        self._unsaved: list[range] = []
        self._saved_at = self._began = time.monotonic()
        self._had = self._said = coming.come_bytes
        self._length = 1  # blocks of one request
        self._pace, self._speed = Pace(), Speed()
        self._ended: Exception | None = None  # nothing is brought any more
        self._halt = threading.Event()  # nothing more is brought until somebody asks again
        self._stopped: str | None = None  # why
        coming.bring = self.start

    def start(self) -> None:
        """Begin to bring what is missing, where nobody does."""
        with self.coming.condition:
            if self._ended is not None:
                self.coming.note_failure(self._ended)
                return
            if self._threads:
                return
            if self.coming.is_whole:
                self._give_name()
                return
            self._halt.clear()
            self._stopped = None
            self._speed = Speed()
            self._speed.note(self.coming.come_bytes)
            self._threads = [
                threading.Thread(target=self._work, name="spillway-download", daemon=True) for _ in range(THREADS)
            ]
            for thread in self._threads:
                thread.start()

    def as_dict(self) -> dict[str, Any]:
        """Return how far it is, ready for JSON. speed: bytes a second, of late. stopped: why no more comes, or None."""
        coming = self.coming
        return {
            "file": coming.path.name,
            "address": self.store.address,
            "come_bytes": coming.come_bytes,
            "total_bytes": coming.file_bytes,
            "speed": 0.0 if self._stopped else self._speed.now,
            "stopped": self._stopped,
        }

    # -- what a thread does

    def _work(self) -> None:
        try:
            while not self._halt.is_set():
                with self.coming.condition:
                    run = self._order.take(self._length)
                if run is None:
                    break
                try:
                    self._bring(run)
                except BaseException:
                    with self.coming.condition:
                        self._order.give_back(run)
                    raise
            self._finish_if_whole()
        except Changed as error:
            self._end(error)
        except Exception as error:  # whatever it is: whoever waits must not wait for ever
            self._fail(error)
        finally:
            self._leave()

    def _leave(self) -> None:
        """Close the files behind the last thread of a download that has ended for good."""
        with self.coming.condition:
            self._threads.remove(threading.current_thread())
            if self._ended is None or self._threads:
                return
            self._file.close()
            self._record.close()
            if sys.platform == "win32":  # which removes no file that is open
                self._remove()

    def _bring(self, run: range) -> None:
        coming = self.coming
        offset = run.start * coming.block_bytes
        nbytes = min(len(run) * coming.block_bytes, coming.file_bytes - offset)
        began = time.monotonic()
        data = self._read(offset, nbytes)
        took = time.monotonic() - began
        with self._writing:
            self._write(offset, data)
        with coming.condition:
            self._unsaved.append(run)
            coming.note_come(run)
            self._speed.note(coming.come_bytes)
            if took < QUICK and len(run) == self._length:
                self._length = min(2 * self._length, max(1, MOST_BYTES // coming.block_bytes))
            elif took > SLOW:
                self._length = max(1, self._length // 2)
        if time.monotonic() - self._saved_at >= SAVE_EVERY:
            with self._saving:
                self._save()
        self._say()

    def _read(self, offset: int, nbytes: int) -> bytes:
        """Return a range of the file. Try again, with pauses, what may work later, for what has not come of it."""
        come = b""
        for pause in (*self.pauses, None):
            try:
                return come + self._read_once(offset + len(come), nbytes - len(come))
            except Unreachable as error:
                come += error.come
                if pause is None or self._halt.is_set():
                    raise Unreachable(
                        f"{self.store.address}: bytes {offset} to {offset + nbytes - 1} could not be brought, in "
                        f"{1 + len(self.pauses)} tries: {error}. Check the network and run the workflow again. What "
                        f"has come ({coming_words(self.coming)}) is kept."
                    ) from None
                log.info("[Spillway] %s: %s. It is tried again in %g s.", self.store.address, error, pause)
                self._halt.wait(pause)
        raise AssertionError("unreachable")

    def _read_once(self, offset: int, nbytes: int) -> bytes:
        """Read a range. One answer alone, as of a server among several, does not make it another file."""
        began = time.monotonic()
        try:
            data = self.store.read(offset, nbytes, self.state, self._pace.limit(nbytes))
        except Changed as error:
            if self.store.state() != self.state:
                raise
            raise Unreachable(f"one answer was of another file ({error})") from None
        except Unreachable as error:
            if error.slow:
                self._pace.given_up()
                self._length = 1
            raise
        self._pace.took(nbytes, time.monotonic() - began)
        return data

    def _write(self, offset: int, data: bytes) -> None:
        self._file.seek(offset)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def _save(self) -> None:
        """Bring what has come to the disk, and only then note that it is there. The caller holds `_saving`."""
        with self.coming.condition:
            runs, self._unsaved = self._unsaved, []
        self._saved_at = time.monotonic()
        try:
            if runs:
                os.fsync(self._file.fileno())
            for run in runs:
                self._record.note(run)
        except OSError:  # nobody knows what of them is on the disk
            with self.coming.condition:
                for run in runs:
                    self.coming.come[run.start : run.stop] = bytes(len(run))
                    self._order.give_back(run)
            raise

    def _say(self) -> None:
        with self.coming.condition:
            come = self.coming.come_bytes
            if come - self._said < SAY_EVERY * self.coming.file_bytes:
                return
            self._said = come
        rate = (come - self._had) / max(time.monotonic() - self._began, 1e-3) / 1e6
        log.info("[Spillway] %s: %s have come, %.1f MB/s", self.coming.path.name, coming_words(self.coming), rate)

    # -- how it ends

    def _finish_if_whole(self) -> None:
        coming = self.coming
        with self._saving:
            if coming.is_whole or self._ended is not None or coming.come.find(0) >= 0:
                return
            self._save()
            os.fsync(self._file.fileno())
            self._file.close()  # Windows renames no file that is open, and a server may set its time then
            self._record.close()
            try:
                with open(coming.data, "rb") as file:
                    whole = stamp(file.fileno())
                self._give_name()
            except OSError as error:  # somebody has removed it: the next run begins anew
                self._ended = SourceError(f"{coming.path}: all of it has come, and it cannot get its name ({error}).")
                forget(coming)
                coming.note_failure(self._ended)
                return
            coming.note_whole(whole)

    def _give_name(self) -> None:
        """Give the file its name. Another file that has got it meanwhile stays, and this one goes."""
        data, path = self.coming.data, self.coming.path
        try:
            if path.is_file():
                data.unlink(missing_ok=True)
                log.warning("[Spillway] %s: another file has got this name meanwhile, and is kept.", path)
            else:
                os.rename(data, path)
                log.info("[Spillway] %s: whole, and a file like any other.", path)
        except PermissionError as error:  # Windows renames no file that is mapped
            log.info("[Spillway] %s: whole. It gets its name in a later run (%s).", path, error)
            return
        sync_folder(path.parent)
        forget(self.coming)
        with suppress(OSError):  # it says nothing to anybody without the sparse file
            self._record_path.unlink()

    def _fail(self, error: Exception) -> None:
        """Stop for now. What has come is kept, and whoever asks next begins again."""
        if not isinstance(error, SourceError):
            error = SourceError(_disk_words(self.coming, error))
        with self._saving, suppress(OSError):
            self._save()
        with self.coming.condition:
            if not self._halt.is_set():  # else another thread has said so, and who waits by now waits for the next try
                log.warning("[Spillway] %s", error)
                self._halt.set()
                self._stopped = str(error)
                self.coming.note_failure(error)

    def _end(self, error: Changed) -> None:
        """Stop for good: what has come is of a file that is no more."""
        with self.coming.condition:
            if self._ended is not None:
                return
            self._ended = error
            self._halt.set()
            log.warning("[Spillway] %s", error)
            self._remove()
            forget(self.coming)
            self.coming.note_failure(error)

    def _remove(self) -> None:
        for path in (self._record_path, self.coming.data):  # without the first nothing counts as come
            with suppress(OSError):
                path.unlink()

    def use(self, address: str, store: Store) -> None:
        """Read from another address of this file, as one that was signed anew. Raises SourceError for another file."""
        now = store.state()
        if not now.mark or now != self.state:
            raise SourceError(
                f"{self.coming.path}: a file of this name is coming from {self.store.address}. The one at "
                f"{store.address} is another. Choose another name for it."
            )
        self.address, self.store = address, store


def coming_words(coming: ComingFile) -> str:
    """Say how much of a file has come."""
    return f"{coming.come_bytes / 1e6:,.1f} of {coming.file_bytes / 1e6:,.1f} MB"


def _disk_words(coming: ComingFile, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        missing = coming.file_bytes - coming.come_bytes
        return (
            f"{coming.data}: the disk is full. {missing / 1e6:,.1f} MB are yet to come. Make room there and run the "
            f"workflow again. What has come ({coming_words(coming)}) is kept."
        )
    return f"{coming.data}: {error}. What has come ({coming_words(coming)}) is kept. Run the workflow again."
