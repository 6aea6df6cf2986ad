"""The folder or bucket that an fsspec address names, and the files of entries in it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, BinaryIO
from urllib.parse import unquote

from ...ops.errors import SpillwayError
from ..disk_format import NotStorable, Stopped
from .tidy import Found

# Only in here, and only files with names of ours, is anything ever written or removed.
FOLDER = "spillway-outputs"
SUFFIX = ".output"
PREFIX, PARTIAL = ".spillway-", ".partial"
ENTRY = re.compile(r"[0-9a-f]{64}\.output")
UNFINISHED = re.compile(r"\.spillway-[0-9a-f]{16}\.partial")
# Protocols of object stores. What is uploaded there appears as a whole or not at all.
OBJECTS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "cos", "r2"}
TIMES = ("mtime", "LastModified", "last_modified", "updated", "last_write_time", "modified", "created")
# A transfer of a few large ranges is faster than one of many small ones.
RANGE = 16 << 20
END = 64 << 10  # holds the JSON of nearly every entry


class NoDriver(SpillwayError, Exception):
    """Raised for an address that nothing installed can open."""


class Place:
    """The entries at an address. Raises OSError, FileNotFoundError where an entry is not there, and NoDriver.

    Each thread has a driver of its own, unless it is one that several may use.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._here = threading.local()
        self._shared: tuple[Any, str] | None = None
        self._opening = threading.Lock()

    def __str__(self) -> str:
        return self.without_secrets(self.address)

    def without_secrets(self, text: str) -> str:
        """Take the name and password of the address out of a text."""
        found = re.search(r":/*(.+)@", self.address)
        if found is None:
            return text
        for secret in (found[1], found[1].partition(":")[2]):
            for form in (secret, unquote(secret)):
                text = text.replace(form, "***") if form else text
        return text

    # -- entries

    def size(self, name: str) -> int | None:
        """Return the bytes of an entry. None where there is none."""
        try:
            with self._driver() as (driver, root):
                found = driver.info(_path(root, name))
        except FileNotFoundError:
            return None
        return int(found["size"]) if found.get("type", "file") == "file" else None

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open an entry for reading. Raises ValueError for what is no plain file: a pipe would wait for ever."""
        with self._driver() as (driver, root):
            path = _path(root, name)
            found = driver.info(path)
            plain = found.get("type", "file") == "file"
            if plain:
                file: Any = driver.open(path, "rb") if _is_local(driver) else _Ranges(driver, path, int(found["size"]))
        if not plain:
            raise ValueError("it is no plain file")
        with file:
            yield file

    def put(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write an entry. It appears when it is whole, and takes the place of one of its name."""
        with self._driver() as (driver, root):
            path = _path(root, name)
            if _protocols(driver) & OBJECTS:
                with tempfile.TemporaryDirectory(prefix="spillway-") as folder:
                    local = os.path.join(folder, "entry")
                    with open(local, "wb") as file:
                        write(file)
                    driver.put_file(local, path)
            else:
                self._put_beside(driver, root, path, write)

    def _put_beside(self, driver: Any, root: str, path: str, write: Callable[[BinaryIO], object]) -> None:
        if not driver.isdir(os.path.dirname(root)):
            # Making it would fill the disk below the mount point of a drive that has gone.
            raise FileNotFoundError(f"the folder {self} does not exist; make it, or mount the drive that holds it")
        folder = os.path.dirname(path)
        if not driver.isdir(folder):
            for one in (root, folder):  # some servers make no folder below one that is not there
                driver.makedirs(one, exist_ok=True)
        partial = f"{folder}/{PREFIX}{secrets.token_hex(8)}{PARTIAL}"
        try:
            with driver.open(partial, "wb") as file:
                if hasattr(file, "set_pipelined"):  # SFTP would wait for an answer to each of its small packets
                    file.set_pipelined(True)
                whole = _Whole(file)
                write(whole)  # type: ignore[arg-type]
            self._check_size(driver, partial, whole.written)
            if _is_local(driver):
                os.replace(partial, path)
            else:
                self._rename(driver, partial, path)
        except BaseException as error:
            with contextlib.suppress(Exception):  # what cannot be removed now is removed when it is a day old
                driver.rm_file(partial)
            # Some drives replace nothing. Then another member has just written the same.
            if not isinstance(error, OSError) or not driver.isfile(path):
                raise

    @staticmethod
    def _rename(driver: Any, partial: str, path: str) -> None:
        try:
            driver.mv(partial, path)
        except Exception:
            if driver.isdir(path) or not driver.exists(path):
                raise
            driver.rm_file(path)  # SMB replaces nothing, and what is there may be damaged
            driver.mv(partial, path)

    @staticmethod
    def _check_size(driver: Any, path: str, nbytes: int) -> None:
        """Raise OSError where less is there than was written: some drivers say nothing of a disk that filled up."""
        size = driver.info(path)["size"]
        if size != nbytes:
            raise OSError(f"{size} bytes are there of {nbytes} that were written")

    def touch(self, name: str) -> None:
        """Note that an entry was used, where the place keeps such times."""
        with self._driver() as (driver, root):
            if _is_local(driver):
                os.utime(_path(root, name))

    # -- all of them

    def files(self) -> list[Found]:
        """List the entries, and what is being written."""
        try:
            with self._driver() as (driver, root):
                driver.invalidate_cache()
                listed = driver.find(root, detail=True)
        except FileNotFoundError:
            return []
        found = []
        for path, about in listed.items():
            name = path.rsplit("/", 1)[-1]
            if about.get("type", "file") == "file" and (ENTRY.fullmatch(name) or UNFINISHED.fullmatch(name)):
                found.append(Found(path, _changed(about), int(about.get("size") or 0), name.endswith(SUFFIX)))
        return found

    def remove(self, path: str) -> bool:
        """Remove a file that `files` has listed. Returns whether it was this call that did."""
        try:
            with self._driver() as (driver, _):
                driver.rm_file(path)
        except FileNotFoundError:  # another member was faster
            return False
        return True

    # -- drivers

    @contextmanager
    def _driver(self) -> Iterator[tuple[Any, str]]:
        """Give a driver and the folder of the entries. Whatever a driver raises becomes an OSError."""
        try:
            yield self._opened()
        except (FileNotFoundError, NoDriver, NotStorable, Stopped):
            raise
        except Exception as error:
            if getattr(error, "errno", None) in (errno.ENOENT, errno.ENOTDIR):  # in the words of the driver, as SMB's
                raise FileNotFoundError(str(error)) from error
            self._here.driver = self._shared = None  # its connection may be dead
            if isinstance(error, OSError):
                raise
            # Each driver has errors of its own, such as missing credentials.
            raise OSError(f"{type(error).__name__}: {error}") from error

    def _opened(self) -> tuple[Any, str]:
        """Give the driver of this thread, or the one of all threads where it may be used by several."""
        mine = self._shared or getattr(self._here, "driver", None)
        if mine is None:
            with self._opening:
                mine = self._shared or self._open_driver()
                if getattr(mine[0], "async_impl", False):
                    self._shared = mine
                self._here.driver = mine
        return mine

    def _open_driver(self) -> tuple[Any, str]:
        try:
            from fsspec import get_filesystem_class
            from fsspec.core import url_to_fs
            from fsspec.utils import get_protocol

            protocol = get_protocol(self.address)
            get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            how = f"install it with {sys.executable} -m pip install NAME, and start ComfyUI again"
            raise NoDriver(f"nothing that is installed can open this address ({error}); {how}") from error
        # SMB's driver would let nobody else read what one reads.
        more = {"share_access": "rwd"} if protocol == "smb" else {}
        driver, base = url_to_fs(self.address, skip_instance_cache=True, **more)
        # A listing that is remembered would hide what other members write.
        if getattr(driver, "dircache", None) is not None:
            driver.dircache.use_listings_cache = False
        return driver, f"{base.rstrip('/')}/{FOLDER}"


class _Whole:
    """Takes all that it is given. Some drivers' files do not say how much they took."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.written = 0

    def write(self, data: memoryview) -> int:
        self._file.write(bytes(data))
        self.written += len(data)
        return len(data)


class _Ranges(io.RawIOBase):
    """Reads a remote file in large ranges: its end first, where an entry says what it is."""

    def __init__(self, driver: Any, path: str, size: int) -> None:
        self._driver, self._path, self._size = driver, path, size
        self._place = 0
        self._start, self._data = 0, b""

    def readable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        self._place = place + (0, self._place, self._size)[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, into: Any) -> int:
        view = memoryview(into).cast("B")
        if not self._start <= self._place < self._start + len(self._data):
            self._fetch()
        begin = self._place - self._start
        part = self._data[begin : begin + len(view)]
        view[: len(part)] = part
        self._place += len(part)
        return len(part)

    def _fetch(self) -> None:
        start, end = self._place, min(self._size, self._place + RANGE)
        if self._size <= END:
            start, end = 0, self._size
        elif self._size - END <= start:
            start, end = self._size - END, self._size
        if start >= end:
            self._start, self._data = self._place, b""
            return
        try:
            self._start, self._data = start, self._driver.cat_file(self._path, start=start, end=end)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


def _path(root: str, name: str) -> str:
    """Return the file of an entry. Folders of a few hundred files are listed fast everywhere."""
    return f"{root}/{name[:2]}/{name}{SUFFIX}"


def _protocols(driver: Any) -> set[str]:
    return {driver.protocol} if isinstance(driver.protocol, str) else set(driver.protocol)


def _is_local(driver: Any) -> bool:
    return bool(getattr(driver, "local_file", False))


def _changed(about: dict[str, Any]) -> float:
    """Return when a file was changed, in seconds since 1970. Each driver says it in its own way."""
    for key in TIMES:
        value = about.get(key)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        if isinstance(value, datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0
