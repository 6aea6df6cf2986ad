"""Says what is in a file without reading all of it: a hash of its beginning, its end and blocks in between."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import time
from collections import OrderedDict

# A safetensors header lies within the first part of all but the largest files. Small files are read as a whole.
FIRST = 1 << 20
LAST = 64 << 10
BLOCKS, BLOCK = 64, 16 << 10
WHOLE = FIRST + LAST + BLOCKS * BLOCK
MAX_REMEMBERED = 20_000
# File systems note times in steps of up to two seconds. Of a younger file, the same times do not mean the same content.
SETTLED_SECONDS = 3.0
# Windows has no time of the last change that nobody can set, so a state there may stand for two contents.
STATES_TELL = sys.platform != "win32"

_known: OrderedDict[tuple[str, int, int, int, int], str] = OrderedDict()


def content_of(path: str, state: os.stat_result) -> str:
    """Return a hash of a file's content. It is computed once for each state. Raises OSError.

    What is no plain file has none: opening a pipe would wait for ever.
    """
    if not stat.S_ISREG(state.st_mode):
        return ""
    key = (path, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    found = _known.get(key)
    if found is None:
        found = _sample(path, state.st_size)
        if STATES_TELL and time.time() - max(state.st_mtime, state.st_ctime) > SETTLED_SECONDS:
            _known[key] = found
            while len(_known) > MAX_REMEMBERED:
                _known.popitem(last=False)
    return found


def _sample(path: str, size: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as file:
        if size <= WHOLE:
            digest.update(file.read(WHOLE))
        else:
            digest.update(file.read(FIRST))
            step = (size - FIRST - LAST) // BLOCKS
            for place in (*(FIRST + number * step for number in range(BLOCKS)), size - LAST):
                file.seek(place)
                digest.update(file.read(LAST if place == size - LAST else BLOCK))
    return digest.hexdigest()
