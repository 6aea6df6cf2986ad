"""Whether what was made earlier may be found on the disk or in the shared store. A comparison computes all anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_left_out = False


def are_used() -> bool:
    """Say whether the tiers below RAM are used."""
    return not _left_out


@contextmanager
def left_out() -> Iterator[None]:
    """Leave the tiers out of prompts that run inside. The server runs one prompt at a time."""
    global _left_out
    _left_out = True
    try:
        yield
    finally:
        _left_out = False
