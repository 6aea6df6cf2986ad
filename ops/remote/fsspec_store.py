"""A file at an address that fsspec knows: s3://, gs://, smb://, sftp://, file:// and so on."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

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


class FsspecStore:
    """Who may read there is fsspec's matter: its settings, the environment, or the driver's own files."""

    def __init__(self, address: str) -> None:
        self.address = without_secrets(address)
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise Refused(
                f"{self.address}: this kind of address needs the package fsspec. Install it with `python -m pip "
                "install fsspec`, in the Python that runs this."
            ) from None
        try:
            self._fs, self._path = url_to_fs(address)
        except ImportError as error:
            raise Refused(f"{self.address}: {_missing(error)}") from None
        except ValueError as error:
            raise Refused(f"{self.address}: fsspec does not know this kind of address ({error}).") from None
        except Exception as error:  # a driver's own: no credentials, no such host
            raise Refused(f"{self.address}: {words_of(error)}") from None
        protocols = self._fs.protocol
        names = {protocols} if isinstance(protocols, str) else set(protocols)
        at_once = bool(names & AT_ONCE) or getattr(self._fs, "async_impl", False)
        self._one_at_a_time: Any = nullcontext() if at_once else threading.Lock()

    def state(self) -> State:
        info = self._try(self._info)
        size = info.get("size")
        if info.get("type") == "directory" or not isinstance(size, int):
            raise Refused(f"{self.address}: this is no file. Give the address of a file.")
        mark = next((f"{name} {info[name]}" for name in MARKS if info.get(name)), "")
        return State(size, mark)

    def read(self, offset: int, nbytes: int, state: State) -> bytes:
        data: bytes = self._try(lambda: self._fs.cat_file(self._path, start=offset, end=offset + nbytes))
        # Most drivers cannot ask for a range of one state alone. Where it is the same afterwards, it was meanwhile.
        now = self.state()
        if now != state:
            raise changed(self.address, state, now)
        if len(data) != nbytes:
            raise Unreachable(f"{len(data)} bytes came in the place of {nbytes}")
        return data

    def _info(self) -> dict[str, Any]:
        self._fs.invalidate_cache()  # else it would say for ever what it said first
        return dict(self._fs.info(self._path))

    def _try(self, call: Any) -> Any:
        try:
            with self._one_at_a_time:
                return call()
        except (FileNotFoundError, IsADirectoryError):
            raise Refused(f"{self.address}: there is no such file. Check the address.") from None
        except PermissionError as error:
            raise Refused(
                f"{self.address}: access is refused ({words_of(error)}). Give the driver its credentials, in the "
                "environment or in fsspec's settings (~/.config/fsspec)."
            ) from None
        except ImportError as error:
            raise Refused(f"{self.address}: {_missing(error)}") from None
        except Exception as error:  # drivers raise errors of their own where the network fails
            raise Unreachable(words_of(error)) from None


def _missing(error: ImportError) -> str:
    """Say which package is to be installed."""
    cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
    module = (cause.name or "").partition(".")[0]
    package = PACKAGES.get(module, module)
    advice = f" Install it with `python -m pip install {package}`, in the Python that runs ComfyUI." if package else ""
    return f"the driver for this kind of address is missing ({error}).{advice}"
