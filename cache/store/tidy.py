"""Chooses which entries of a store go. Pure: what two members choose of the same listing is the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Where the cap is exceeded, entries go until this part of it is held: else each next entry would list the store anew.
ROOM = 0.9
DAY = 86400.0
# Seconds after which a file that is still unfinished is nobody's any more.
ABANDONED = DAY


class Found(NamedTuple):
    """A file of a store. changed: seconds since 1970 by the store's clock. whole: an entry, not one being written."""

    path: str
    changed: float
    nbytes: int
    whole: bool = True


def going(files: Iterable[Found], cap: int, days: float, here: float, more: int = 0) -> list[Found]:
    """List what goes so that `more` bytes fit under the cap, the oldest first. 0 is no cap, and no limit of days.

    The store's youngest file says what time it is, or `here`, this machine's clock, where that is earlier. A member
    whose clock is wrong, or a file that is dated ahead, would else remove everything.
    """
    ordered = sorted(files, key=lambda file: (file.changed, file.path))
    now = min(ordered[-1].changed, here) if ordered else 0.0
    held = sum(file.nbytes for file in ordered)
    target = cap if held + more <= cap else int(cap * ROOM)
    chosen = []
    for file in ordered:
        age = now - file.changed
        old = age > days * DAY > 0 if file.whole else age > ABANDONED
        if old or (cap and file.whole and held + more > target):
            chosen.append(file)
            held -= file.nbytes
    return chosen
