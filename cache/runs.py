"""Counts what the output cache did for each run of a workflow."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..ops.ledger import in_words


@dataclass
class Run:
    """One prompt. hits: outputs that it found. misses: outputs that it made. bytes of both, and of what was evicted.

    saved_seconds: that the found outputs took to make. made_seconds: that the others took.
    """

    hits: int = 0
    hit_bytes: int = 0
    saved_seconds: float = 0.0
    misses: int = 0
    made_bytes: int = 0
    made_seconds: float = 0.0
    evictions: int = 0
    evicted_bytes: int = 0

    def found(self, nbytes: int, seconds: float) -> None:
        """Count an output that was there."""
        self.hits += 1
        self.hit_bytes += nbytes
        self.saved_seconds += seconds

    def made(self, nbytes: int, seconds: float) -> None:
        """Count an output that was made."""
        self.misses += 1
        self.made_bytes += nbytes
        self.made_seconds += seconds

    def evicted(self, count: int, nbytes: int) -> None:
        """Count outputs that were evicted meanwhile."""
        self.evictions += count
        self.evicted_bytes += nbytes

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        return asdict(self)

    @property
    def words(self) -> str:
        """Return the same for a person."""
        return (
            f"found {self.hits} outputs ({in_words(self.hit_bytes)}, {self.saved_seconds:.1f} s saved), made "
            f"{self.misses} ({in_words(self.made_bytes)}, {self.made_seconds:.1f} s), evicted {self.evictions} "
            f"({in_words(self.evicted_bytes)})"
        )
