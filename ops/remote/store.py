"""Where a file lies that is not on this machine: its size and state, and ranges of its bytes. Needs no torch."""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

from ..files.safetensors_header import SourceError

# In the words of others: who asks, and what an address was signed with.
USER, SIGNATURE = re.compile(r"//[^/@\s'\"]*@"), re.compile(r"\?[^\s'\"]+")


class Refused(SourceError):
    """The file cannot be had, however often it is tried."""


class Changed(SourceError):
    """The file is no longer the one whose first bytes were brought."""


class Unreachable(SourceError):
    """The file cannot be had now. come: the first bytes of the range, which have. slow: it took too long."""

    def __init__(self, *args: object, come: bytes = b"", slow: bool = False) -> None:
        super().__init__(*args)
        self.come, self.slow = come, slow


class State(NamedTuple):
    """Which file lies there. mark: what its place says of its content, such as an ETag or the time of its last change.

    Two states are of one content where they are equal. A place that says nothing has an empty mark.
    """

    nbytes: int
    mark: str


class Store(Protocol):
    """A file that lies elsewhere. Several threads read from it."""

    address: str  # without what is secret, for messages

    def state(self) -> State:
        """Ask which file lies there. Raises Refused or Unreachable."""

    def read(self, offset: int, nbytes: int, state: State, seconds: float = 600.0) -> bytes:
        """Return a range of bytes of the file in that state, neither more nor less. Raises Changed too.

        seconds: after which it is given up. Another call then asks over another connection.
        """


def is_address(name: str) -> bool:
    """Say whether a text is an address, and no path."""
    return "://" in name


def without_secrets(address: str) -> str:
    """Return an address without passwords and signatures, for logs and errors. Of a chain (`a::b`) in each part."""
    shown = []
    for link in links_of(address):
        try:
            parts = urlsplit(link)
        except ValueError:  # no address at all: whatever is in it
            shown.append(f"{link.partition('://')[0]}://...")
            continue
        shown.append(urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")))
    return "::".join(shown)


def links_of(address: str) -> list[str]:
    """Split a chain of addresses (`a::b`). The colons of an IPv6 address (`[::1]`) divide nothing."""
    return re.split(r"::(?![^\[\]]*\])", address)


def words_of(error: BaseException) -> str:
    """Return what a driver says of an error, without passwords and signatures of addresses in it."""
    return SIGNATURE.sub("?...", USER.sub("//", f"{type(error).__name__}: {error}"))


def file_name(address: str) -> str:
    """Return the name of the file that an address names, '' where it names none."""
    return unquote(urlsplit(address).path).replace("\\", "/").rpartition("/")[2]


def changed(address: str, before: State, now: State) -> Changed:
    """Word the error for a file that is another one by now."""
    was, is_now = (f"{state.nbytes} bytes ({state.mark or 'no mark'})" for state in (before, now))
    return Changed(
        f"{address}: this file changed while it was downloaded: it had {was}, now it has {is_now}. What had come is of "
        "no use and is dropped. Run the workflow again: the download begins anew."
    )
