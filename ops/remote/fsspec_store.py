"""A file at an address that fsspec knows: s3://, gs://, smb://, sftp://, file:// and so on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from errno import EACCES, EISDIR, ENOENT, ENOTDIR, EPERM
from typing import Any, NamedTuple, TypeVar

from .pace import PATIENCE, within
from .store import Refused, State, Unreachable, changed, without_secrets, words_of

# What places call the mark of a content, the most certain first.
MARKS = (
    *("ETag", "etag", "md5Hash", "content_md5", "generation", "blob_id", "sha", "modify"),
    *("mtime", "LastModified", "last_modified", "modified", "updated", "created"),
)
# Where the package that pip knows is not called like the module.
PACKAGES = {"smbclient": "smbprotocol", "google": "gcsfs", "azure": "adlfs", "pyarrow.fs": "pyarrow"}


# Of which several threads may read at once. Others have one connection, or one open file, and would mix answers.
AT_ONCE = {"file", "local", "memory", "smb", "hf", "github"}


T = TypeVar("T")


class Driver(NamedTuple):
    """fs: fsspec's. one_at_a_time: held by whoever asks it, where no two may."""

    fs: Any
    path: str
    one_at_a_time: Any


class FsspecStore:
    """Who may read there is fsspec's matter: its settings, the environment, or the driver's own files."""

    def __init__(self, address: str) -> None:
        self.address = without_secrets(address)
        self._address = address
        self._driver = self._open(again=False)

    def _open(self, again: bool) -> Driver:
        """Open a driver. again: one with connections of its own."""
        try:
            from fsspec import get_filesystem_class
            from fsspec.core import url_to_fs
            from fsspec.utils import get_protocol
        except ImportError:
            raise Refused(
                f"{self.address}: this kind of address needs the package fsspec. Install it with `python -m pip "
                "install fsspec`, in the Python that runs this."
            ) from None
        options = {"skip_instance_cache": True} if again else {}
        try:
            protocol = get_protocol(self._address)
            get_filesystem_class(protocol)
            # SMB's driver would let nobody else read the file meanwhile, this process included.
            more = {"share_access": "r"} if protocol == "smb" else {}
        except ImportError as error:
            raise Refused(f"{self.address}: {_missing(error)}") from None
        except ValueError as error:
            raise Refused(f"{self.address}: fsspec does not know this kind of address ({error}).") from None
        try:
            fs, path = url_to_fs(self._address, **options, **more)
        except ImportError as error:
            raise Refused(f"{self.address}: {_missing(error)}") from None
        except Exception as error:  # a driver's own: no credentials, no such host
            raise (Unreachable if again else Refused)(f"{self.address}: {words_of(error)}") from None
        names = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        at_once = bool(names & AT_ONCE) or getattr(fs, "async_impl", False)
        return Driver(fs, path, nullcontext() if at_once else threading.Lock())

    def state(self) -> State:
        return self._within(2 * PATIENCE, self._state)

    def read(self, offset: int, nbytes: int, state: State, seconds: float = 600.0) -> bytes:
        return self._within(seconds, lambda driver: self._read(driver, offset, nbytes, state))

    def _within(self, seconds: float, call: Callable[[Driver], T]) -> T:
        """Ask the driver, and open another one where that takes too long: its connection may be dead."""
        driver = self._driver
        try:
            return within(seconds, lambda: call(driver))
        except Unreachable as error:
            if error.slow and self._driver is driver:
                self._driver = within(2 * PATIENCE, lambda: self._open(again=True))
            raise

    def _state(self, driver: Driver) -> State:
        info = self._try(driver, lambda: self._info(driver))
        size = info.get("size")
        if info.get("type") == "directory" or not isinstance(size, int):
            raise Refused(f"{self.address}: this is no file. Give the address of a file.")
        mark = next((f"{name} {info[name]}" for name in MARKS if info.get(name)), "")
        return State(size, mark)

    def _read(self, driver: Driver, offset: int, nbytes: int, state: State) -> bytes:
        data: bytes = self._try(driver, lambda: driver.fs.cat_file(driver.path, start=offset, end=offset + nbytes))
        # Most drivers cannot ask for a range of one state alone. Where it is the same afterwards, it was meanwhile.
        now = self._state(driver)
        if now != state:
            raise changed(self.address, state, now)
        if len(data) != nbytes:
            raise Unreachable(f"{len(data)} bytes came in the place of {nbytes}")
        return data

    def _info(self, driver: Driver) -> dict[str, Any]:
        driver.fs.invalidate_cache()  # else it would say for ever what it said first
        return dict(driver.fs.info(driver.path))

    def _try(self, driver: Driver, call: Any) -> Any:
        try:
            with driver.one_at_a_time:
                return call()
        except ImportError as error:
            raise Refused(f"{self.address}: {_missing(error)}") from None
        except Exception as error:  # drivers raise errors of their own, also those of the system, as SMB's does
            code = getattr(error, "errno", None)
            if isinstance(error, FileNotFoundError | IsADirectoryError) or code in (ENOENT, EISDIR, ENOTDIR):
                raise Refused(f"{self.address}: there is no such file. Check the address.") from None
            if isinstance(error, PermissionError) or code in (EACCES, EPERM):
                raise Refused(
                    f"{self.address}: access is refused ({words_of(error)}). Give the driver its credentials, in the "
                    "environment or in fsspec's settings (~/.config/fsspec)."
                ) from None
            raise Unreachable(words_of(error)) from None


def _missing(error: ImportError) -> str:
    """Say which package is to be installed."""
    cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
    module = (cause.name or "").partition(".")[0]
    package = PACKAGES.get(module, module)
    advice = f" Install it with `python -m pip install {package}`, in the Python that runs ComfyUI." if package else ""
    return f"the driver for this kind of address is missing ({error}).{advice}"
