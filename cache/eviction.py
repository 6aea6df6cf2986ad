"""What an eviction takes, and what comes of it."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from ..ops.ledger import in_words
from .holdings import Entry

ALL = 1 << 60  # bytes that are asked for where all is meant
NAMED = 5  # kinds of nodes in a line for the log


@dataclass(frozen=True)
class Eviction:
    """The result of one call. short: bytes wanted. freed: bytes that no other entry held. words: a line for the log."""

    short: int
    freed: int
    entries: int
    words: str


@dataclass
class Taken:
    """What `take` took out of the cache, until `let_go`. gone: (entry, value, bytes that no other entry holds)."""

    short: int
    freed: int
    reason: str
    gone: deque[tuple[Entry, Any, int]]
    models: bool

    seconds: float = 0.0  # that making them took

    @property
    def words(self) -> str:
        """Say what is evicted, for the log."""
        why = self.reason if self.short >= ALL else f"{in_words(self.short)} short ({self.reason})"
        if not self.gone:
            return f"nothing to evict: {why}"
        names = Counter(entry.kind or entry.label for entry, _, _ in self.gone)
        listed = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in list(names.items())[:NAMED])
        more = f" and {len(names) - NAMED} more kinds" if len(names) > NAMED else ""
        return f"evicted {len(self.gone)} outputs ({listed}{more}), {in_words(self.freed)}: {why}"
