"""Writes the C library's figures to the debug log around what takes and gives memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ..ledger import in_words
from .allocator import arenas

log = logging.getLogger("spillway")


@contextmanager
def arenas_logged(what: str) -> Iterator[None]:
    """Log at level DEBUG what the block changed in the C library's arenas. Without that level nothing is asked.

    Memory that is free there and not given back tells fragmentation from a leak.
    """
    if not log.isEnabledFor(logging.DEBUG):
        yield
        return
    before = arenas()
    try:
        yield
    finally:
        log.debug("[Spillway] %s: %s", what, _in_words(before, arenas()))


def _in_words(before: dict[str, int], after: dict[str, int]) -> str:
    if not before or not after:
        return "the C library gives no figures of its arenas (no mallinfo2)"
    parts = []
    for name, now in after.items():
        change = now - before[name]
        sign = f" ({'+' if change > 0 else '-'}{in_words(abs(change))})" if change else ""
        parts.append(f"{name} {in_words(now)}{sign}")
    return "allocator's " + ", ".join(parts)
