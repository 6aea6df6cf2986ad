"""How long a range may take, and the end of what takes longer: another connection may be faster."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from .aside import Aside
from .store import Unreachable

# Seconds that any range may take, and that a server may be silent.
PATIENCE = 30.0
# Bytes a second below which a connection is given up in any case.
SLOWEST = 4 << 10
# A connection that is so many times slower than another one was is given up too.
MUCH_SLOWER = 20
# Where one was given up, the others may be that many times slower than before: the network may have become so.
LENIENT = 4
# Seconds over which the speed that is shown is measured.
OF_LATE = 10.0

T = TypeVar("T")


class Pace:
    """Learns from ranges how fast one connection is. Several threads use it."""

    def __init__(self) -> None:
        self._fastest = 0.0

    def limit(self, nbytes: int) -> float:
        """Return the seconds that a range of so many bytes may take."""
        return PATIENCE + nbytes / max(SLOWEST, self._fastest / MUCH_SLOWER)

    def took(self, nbytes: int, seconds: float) -> None:
        """Learn from a range that has come."""
        self._fastest = max(self._fastest, nbytes / max(seconds, 1e-3))

    def given_up(self) -> None:
        """Learn from one that has not."""
        self._fastest /= LENIENT


class Speed:
    """How fast bytes have come of late. Called by whoever holds the file's condition."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def note(self, come: int) -> None:
        """Note how many bytes have come by now."""
        now = time.monotonic()
        self._points.append((now, come))
        while now - self._points[0][0] > OF_LATE:
            self._points.popleft()

    @property
    def now(self) -> float:
        """Return bytes a second. 0 where nothing came of late."""
        points = list(self._points)
        seconds = time.monotonic() - points[0][0] if points else 0.0
        return (points[-1][1] - points[0][1]) / seconds if 0 < seconds < 2 * OF_LATE else 0.0


class Deadline:
    """A moment, so many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end


def within(seconds: float, call: Callable[[], T]) -> T:
    """Make a call in another thread, which is left alone where it takes longer. Raises Unreachable then."""
    aside = Aside(call, "spillway-range")
    if not aside.wait(seconds):
        raise Unreachable(f"no whole answer within {seconds:.0f} s", slow=True)
    return aside.result()
