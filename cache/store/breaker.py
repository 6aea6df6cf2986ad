"""Stops asking something that fails, and tries again after a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PATIENCE = 3  # failures in a row
PAUSE_SECONDS = 30.0
LONGEST_PAUSE = 600.0


class Breaker:
    """Is closed while all is well. Failures open it, and nobody asks any more.

    After a pause one question may be asked. If it fails too, the next pause is twice as long. Whoever `allows` has let
    through says `succeeded`, `failed` or `given_up`. why: of the last failure, None while it is closed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.why: str | None = None
        self._clock = clock
        self._failures = 0
        self._pause = PAUSE_SECONDS
        self._again = 0.0
        self._trying = False
        self._lock = threading.Lock()

    def allows(self) -> bool:
        """Say whether to ask now."""
        with self._lock:
            if self.why is None:
                return True
            if self._trying or self._clock() < self._again:
                return False
            self._trying = True
            return True

    def succeeded(self) -> bool:
        """Close it. Returns whether it was open."""
        with self._lock:
            was_open, self.why = self.why is not None, None
            self._failures, self._pause, self._trying = 0, PAUSE_SECONDS, False
            return was_open

    def failed(self, why: str, *, at_once: bool = False) -> bool:
        """Count a failure. at_once: it cost so much that no second one is waited for. Returns whether it opened now."""
        with self._lock:
            self._failures += 1
            if self.why is None and not at_once and self._failures < PATIENCE:
                return False
            opened, self.why = self.why is None, why
            if opened or self._trying:  # what was under way before it opened makes no pause longer
                self._again = self._clock() + self._pause
                self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._trying = False
            return opened

    def given_up(self) -> None:
        """Nobody learnt how it is."""
        with self._lock:
            self._trying = False
