"""Has a file that lies elsewhere come into a folder of this machine. It can be used at once, under its later name."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..files.coming_file import ASK_EVERY, BLOCK_BYTES, ComingFile, coming_file, patience, register
from ..files.file_state import file_state
from ..files.safetensors_header import SourceError
from . import block_record
from .aside import Aside
from .download import PAUSES, Download, coming_words
from .open_store import open_store
from .store import State, Store, Unreachable

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger("spillway")

# Of the sparse file, and of what says which of its blocks have come. ComfyUI lists no files of such names.
DATA, RECORD = ".spillway-coming", ".spillway-blocks"
# A file system that is filled to the last byte is slow, and others write there too.
SPARE_BYTES = 64 << 20

T = TypeVar("T")
_fetching = threading.Lock()
_downloads: dict[Path, Download] = {}
_lost: dict[Path, int] = {}  # how often the file of a download went


def fetch(
    address: str,
    path: str | os.PathLike[str],
    *,
    block_bytes: int = BLOCK_BYTES,
    pauses: Sequence[float] = PAUSES,
    open_store: Callable[[str], Store] = open_store,
) -> ComingFile | None:
    """Have the file at an address come to `path`. Return it, or None where a file is there already, which is kept.

    The file is usable at once: whoever reads from it waits for what he reads. A download that was cut off goes on where
    it was, in whatever process. Raises SourceError where there is no such file, no room, or another process that
    brings it.
    """
    path = Path(os.path.abspath(path))
    with _fetching:
        known, download = coming_file(path), _downloads.get(path)
        if known is not None and download is not None:
            if download.address != address:

                def use() -> None:
                    other = open_store(address)
                    patiently(lambda: download.use(address, other), other.address, pauses)

                interruptible(use)
            download.start()
            return known
        if path.is_file():
            _remove_record(path)
            return None
        if os.path.lexists(path):
            raise SourceError(
                f"{path}: a folder has this name, or a link to a file that is gone. Remove it, or choose another name."
            )

        def ask() -> tuple[Store, State]:
            store = open_store(address)
            return store, patiently(store.state, store.address, pauses)

        store, state = interruptible(ask)
        path.parent.mkdir(parents=True, exist_ok=True)
        data, record_path = path.with_name(path.name + DATA), path.with_name(path.name + RECORD)
        if not data.exists():
            _remove_record(path)  # of a file that is gone
        file = _open_locked(data)
        if path.is_file():  # of another process, that has just ended its download
            file.close()
            data.unlink()
            return None
        record: block_record.BlockRecord | None = None
        try:
            found = block_record.read(record_path, state, block_bytes) if state.mark else None
            fits = os.fstat(file.fileno()).st_size == state.nbytes
            if found is None or not fits:
                if found is not None:
                    found[0].close()
                if record_path.exists():
                    log.info("[Spillway] %s: it is not the file of which a part had come. It begins anew.", path)
                _remove_record(path)
                file.truncate(0)
                _check_room(path, state.nbytes)
                file.truncate(state.nbytes)
                record, come = block_record.create(record_path, state, block_bytes), None
            else:
                record, come = found
            coming = ComingFile(path, data, state.nbytes, block_bytes)
            if come is not None:
                coming.come[:] = come
                log.info("[Spillway] %s: goes on, %s are there", path, coming_words(coming))
            _check_room(path, state.nbytes - coming.come_bytes)
        except BaseException:
            file.close()
            if record is not None:
                record.close()
            raise
        register(coming)
        _downloads[path] = Download(store, state, coming, file, record, record_path, address, pauses)
        _downloads[path].start()
        return coming


def wait_for(coming: ComingFile, progress: Callable[[int, int], None]) -> None:
    """Wait until all of a file has come and it has its name. progress(done, total): told counts of bytes."""
    while not coming.is_whole:
        progress(coming.come_bytes, coming.file_bytes)
        missing = coming.come.find(0)
        if missing < 0:
            coming.wait_whole()  # which raises what keeps it from getting its name
        else:
            coming.wait(missing * coming.block_bytes, 1)
            time.sleep(ASK_EVERY)
    progress(coming.file_bytes, coming.file_bytes)


def now_coming() -> list[dict[str, Any]]:
    """Return how far each file is of which a part has yet to come, ready for JSON. See `Download.as_dict`."""
    found = [download for path, download in list(_downloads.items()) if coming_file(path) is download.coming]
    return [download.as_dict() for download in found if not download.coming.is_whole]


def token(path: str | os.PathLike[str]) -> str:
    """Say which file is meant by a path that a download may fill: another text means that it is to be fetched anew.

    It stays the same while a file comes, and when it is whole.
    """
    path = Path(os.path.abspath(path))
    with _fetching:
        download = _downloads.get(path)
        if download is not None and not _is_ours(path, download):
            del _downloads[path]
            _lost[path] = _lost.get(path, 0) + 1
            download = None
        if download is None:
            state = file_state(path)
            if state:
                return state
        return f"download {_lost.get(path, 0)}"


def _is_ours(path: Path, download: Download) -> bool:
    """Say whether a download goes on, or has left the file that is there now."""
    if coming_file(path) is download.coming:
        return True
    with suppress(OSError):
        status = os.stat(path)
        return (status.st_size, status.st_mtime_ns) == download.coming.stamp
    return False


def patiently(call: Callable[[], T], address: str, pauses: Sequence[float]) -> T:
    """Make a call that the network may fail, three times at most."""
    for pause in (*pauses[:2], None):
        try:
            return call()
        except Unreachable as error:
            if pause is None:
                raise Unreachable(
                    f"{address}: {error}. Check the address and the network, and run the workflow again."
                ) from None
            time.sleep(pause)
    raise AssertionError("unreachable")


def interruptible(call: Callable[[], T]) -> T:
    """Make a call in another thread. Raises what `patience` says while it takes."""
    aside = Aside(call, "spillway-ask")
    while not aside.wait(ASK_EVERY):
        patience.check()
    return aside.result()


def _check_room(path: Path, nbytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if nbytes + SPARE_BYTES > free:
        raise SourceError(
            f"{path}: {nbytes / 1e6:,.1f} MB are to come, and {free / 1e6:,.1f} MB are free in its folder. Make room "
            "there, or choose a folder on another disk."
        )


def _remove_record(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.with_name(path.name + RECORD).unlink()


def _open_locked(data: Path) -> BinaryIO:
    """Open a sparse file to write. Raises SourceError where another process does."""
    file = os.fdopen(os.open(data, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b", buffering=0)
    try:
        if sys.platform == "win32":
            file.seek(1 << 62)  # no byte that is ever written
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise SourceError(
            f"{data}: another process downloads this file. Wait until it is done, and run the workflow again."
        ) from None
    except OSError:  # a file system without locks
        pass
    return file  # type: ignore[return-value]
