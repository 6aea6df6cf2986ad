"""A file on a web server, read by byte ranges. Each answer is checked: servers may ignore a range or send another."""

from __future__ import annotations

import base64
import http.client
import netrc
import re
from contextlib import suppress
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from .pace import PATIENCE, Deadline, within
from .store import Refused, State, Unreachable, changed, without_secrets

CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)$")
# Of errors that another try may not meet: too early, too many requests, and the server's own.
PASSING = (408, 425, 429)
NO_SUCH_RANGE = 416
MOST_FILE_BYTES = 16 << 40
# Bytes that are read at once. Between two reads it is looked whether it takes too long.
PIECE = 1 << 20


class HttpStore:
    """address: with `user:password@` where the server wants one. Else ~/.netrc is asked for the server's host.

    Nothing secret goes to a host that it was not given for: whoever made a workflow chooses its addresses.
    """

    def __init__(self, address: str, timeout: float = PATIENCE) -> None:
        self.address, self.timeout = without_secrets(address), timeout
        parts = urlsplit(address)
        user, _, place = parts.netloc.rpartition("@")
        self._url = urlunsplit((parts.scheme, place, quote(parts.path, safe="/%:@+,;=~!$&'()*"), parts.query, ""))
        known = unquote(user) or _known_for(parts.hostname)
        self._private = {"Authorization": f"Basic {base64.b64encode(known.encode()).decode()}"} if known else {}

    def state(self) -> State:
        return within(2 * self.timeout, self._state)

    def _state(self) -> State:
        with self._ask(0, 1) as answer:
            return self._state_of(answer, 0, 1)

    def read(self, offset: int, nbytes: int, state: State, seconds: float = 600.0) -> bytes:
        # A server may also be slow to send what comes before the bytes, which no time limit of Python's covers.
        return within(seconds + self.timeout, lambda: self._read(offset, nbytes, state, Deadline(seconds)))

    def _read(self, offset: int, nbytes: int, state: State, deadline: Deadline) -> bytes:
        with self._ask(offset, nbytes, state) as answer:
            now = self._state_of(answer, offset, nbytes)
            if now != state:
                raise changed(self.address, state, now)
            pieces, left = [], nbytes
            try:
                while left and (piece := answer.read1(min(left, PIECE))):
                    pieces.append(piece)
                    left -= len(piece)
                    if left and deadline.is_over:
                        words = f"{nbytes - left} of {nbytes} bytes came in {deadline.seconds:.0f} s"
                        raise Unreachable(words, come=b"".join(pieces), slow=True)
            except (OSError, http.client.HTTPException) as error:
                raise Unreachable(f"{type(error).__name__}: {error}", come=b"".join(pieces)) from None
        data = b"".join(pieces)
        if left:
            raise Unreachable(f"the answer was cut after {len(data)} of {nbytes} bytes", come=data)
        return data

    def _ask(self, offset: int, nbytes: int, state: State | None = None) -> Any:
        """Ask for a range. Return the answer. state: that the range is in the file of."""
        request = Request(self._url, headers={"Range": f"bytes={offset}-{offset + nbytes - 1}"})
        request.add_header("Accept-Encoding", "identity")
        request.add_header("User-Agent", "Spillway")
        for name, value in self._private.items():  # not to be sent on to whatever server this one names
            request.add_unredirected_header(name, value)
        try:
            return urlopen(request, timeout=self.timeout)
        except HTTPError as error:
            error.close()
            if error.code == NO_SUCH_RANGE and state is not None:
                total = error.headers.get("Content-Range", "").rpartition("/")[2]
                now = State(int(total) if total.isdecimal() else 0, error.headers.get("ETag") or "")
                raise changed(self.address, state, now) from None
            if error.code in PASSING or error.code >= 500:
                raise Unreachable(f"the server answered {error.code} ({error.reason})") from None
            raise Refused(
                f"{self.address}: the server answered {error.code} ({error.reason}). {_advice(error.code)}"
            ) from None
        except (http.client.InvalidURL, ValueError):  # whose words hold all of the address
            raise Refused(f"{self.address}: this is no address of a file.") from None
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from None

    def _state_of(self, answer: Any, offset: int, nbytes: int) -> State:
        """Return the state that an answer is of. Raises Refused where it is not the range that was asked for."""
        said = answer.headers.get("Content-Range", "")
        found = CONTENT_RANGE.match(said.strip())
        packed = answer.headers.get("Content-Encoding", "identity") != "identity"  # other bytes than the file's
        if answer.status != 206 or found is None or packed:
            raise Refused(
                f"{self.address}: the server does not send parts of files: asked for bytes {offset} to "
                f"{offset + nbytes - 1}, it answered {answer.status}. Download the whole file with a browser or curl, "
                "into ComfyUI's models folder."
            )
        first, last, total = map(int, found.groups())
        if (first, last) != (offset, min(offset + nbytes, total) - 1):
            raise Refused(
                f"{self.address}: asked for bytes {offset} to {offset + nbytes - 1}, the server sent {first} to "
                f"{last}. Download the whole file with a browser or curl, into ComfyUI's models folder."
            )
        if total > MOST_FILE_BYTES:
            raise Refused(f"{self.address}: the server says that this file has {total} bytes, which no model has.")
        return State(total, answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")


def _advice(code: int) -> str:
    if code in (401, 403):
        return (
            "It wants to know who you are, or the address has expired. Write the server's name, a user and a password "
            "or token into ~/.netrc. What stands in the address is saved with the workflow, and in pictures."
        )
    return "Check the address in a browser."


def _known_for(host: str | None) -> str:
    """Return `user:password` of ~/.netrc for a host, '' where it has none."""
    with suppress(OSError, netrc.NetrcParseError):
        given = netrc.netrc()
        found = given.authenticators(host) if host in given.hosts else None  # and not what is for all hosts
        return f"{found[0]}:{found[2] or ''}" if found is not None else ""
    return ""
