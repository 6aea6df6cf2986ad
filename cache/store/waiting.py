"""Counts how long a prompt has waited, so that it never waits longer than it may."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Waiting:
    """The seconds that one prompt may still wait. Waits at the same time count once. What a wait saved is given back.

    It belongs to one event loop.
    """

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._spent = 0.0
        self._waits = 0
        self._since = 0.0

    @property
    def spent(self) -> float:
        """Seconds that were waited so far and have saved nothing."""
        return self._spent + (self._clock() - self._since if self._waits else 0.0)

    @property
    def left(self) -> float:
        """Seconds that may still be waited."""
        return max(0.0, self.limit - self.spent)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is waited in here."""
        if not self._waits:
            self._since = self._clock()
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1
            if not self._waits:
                self._spent += self._clock() - self._since

    def saved(self, seconds: float) -> None:
        """Give back what a wait was worth."""
        self._spent = max(0.0, self._spent - seconds)
