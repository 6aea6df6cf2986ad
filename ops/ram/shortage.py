"""What happens where the system refuses memory: whoever holds some gives way, and then an error names the limit."""

from __future__ import annotations

import errno
import re
import weakref
from collections.abc import Callable
from typing import Protocol, TypeVar

from ..errors import SpillwayError
from ..ledger import in_words
from . import allocator
from .available import available_ram, refusing_limit

T = TypeVar("T")
MIB = 1 << 20
# Given way beside what was refused, as an allocation seldom comes alone.
SPARE = 64 * MIB
# Windows' codes for too little memory, and for a commit limit that is reached.
WINDOWS = (8, 1455)


class OutOfRAM(SpillwayError, MemoryError):
    """Memory that the system refuses: names what for, the limit, and what to do."""


class Holder(Protocol):
    """Holds RAM that it can do without."""

    def give_ram(self, nbytes: int) -> int:
        """Free at least `nbytes` where it can. Return the bytes freed. Must wait for no lock."""


_holders: list[weakref.ref[Holder]] = []


def register(holder: Holder) -> None:
    """Ask `holder` for RAM from now on, for as long as it lives. Earlier ones are asked first."""
    _holders[:] = [known for known in _holders if known() is not None]
    _holders.append(weakref.ref(holder))


def give_way(nbytes: int) -> int:
    """Have the holders free `nbytes`. Return the bytes freed."""
    freed = 0
    for known in list(_holders):
        holder = known()
        if holder is not None and freed < nbytes:
            freed += holder.give_ram(nbytes - freed)
    if freed:
        allocator.trim()  # small blocks stay in its arenas else, and those of a computation up to 32 MiB
    return freed


def make_room(nbytes: int) -> int:
    """Have the holders give way until `nbytes` are available. Return the bytes freed."""
    short = nbytes - available_ram().available
    return give_way(short) if short > 0 else 0


def is_refusal(error: BaseException) -> bool:
    """Say whether an error says that the system refused host memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or getattr(error, "winerror", None) in WINDOWS
    if isinstance(error, RuntimeError):  # torch's allocator
        return "can't allocate memory" in str(error) or "not enough memory" in str(error)
    return isinstance(error, MemoryError)


def refused_bytes(error: BaseException) -> int:
    """Return the bytes that torch's allocator was refused, as its error tells them. 0 where it does not."""
    found = re.search(r"tried to allocate (\d+) bytes", str(error))
    return int(found[1]) if found else 0


def explained(nbytes: int, what: str) -> OutOfRAM:
    """Word the error for memory that was refused. what: it is for, as the subject of a sentence."""
    limit = refusing_limit()
    needs = f"{what} needs {in_words(nbytes)} of memory" if nbytes else f"{what} needs more memory"
    return OutOfRAM(
        f"{needs}, which the system refuses: {in_words(limit.available)} are left of {limit.reason}. {limit.remedy}"
    )


def obtain(make: Callable[[], T], nbytes: int, what: str) -> T:
    """Return what `make` allocates. Where that is refused, have the holders give way and call it once more.

    Raises OutOfRAM where it is refused again. what: it is for, as the subject of a sentence.
    """
    try:
        return make()
    except (OSError, RuntimeError, MemoryError) as error:
        if not is_refusal(error):
            raise
    give_way(max(0, nbytes - refusing_limit().available) + SPARE)
    try:
        return make()
    except (OSError, RuntimeError, MemoryError) as error:
        if not is_refusal(error):
            raise
        raise explained(nbytes, what) from error
