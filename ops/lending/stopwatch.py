"""Measures how long the device computes with each bundle, and how fast the bus is, by events of the first steps."""

from __future__ import annotations

from typing import Any

from ..device.backend import Backend
from .bundle import Bundle
from .guess import kind_and_number

# A smaller transfer is mostly latency.
LEAST_BYTES = 1 << 20
# The slower ones waited for something else.
QUANTILE = 0.9


class Stopwatch:
    """Marks of one step. The events end when the device comes to them, so nothing waits until `seconds` is asked.

    disturbed: bundles were read and memory was locked meanwhile, so kernels were launched late here and there.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.disturbed = False
        self._open: tuple[Bundle, Any] | None = None
        self._computed: list[tuple[Bundle, Any, Any]] = []
        self._sent: list[tuple[int, Any, Any]] = []

    def begin(self, bundle: Bundle) -> None:
        """The main stream has the bundle, and computes with it from now on."""
        self._open = bundle, self.backend.timer(None)

    def end(self) -> None:
        """The main stream computes with another bundle from now on, once it has come."""
        if self._open is not None:
            bundle, start = self._open
            self._open, end = None, self.backend.timer(None)
            if start is not None and end is not None:  # else the device has just been stepped down
                self._computed.append((bundle, start, end))

    def sent(self, nbytes: int, start: Any, end: Any) -> None:
        """Note the events around a transfer."""
        if nbytes >= LEAST_BYTES and end is not None:
            self._sent.append((nbytes, start, end))

    @property
    def has_marks(self) -> bool:
        return bool(self._computed)

    def seconds(self) -> dict[Bundle, float]:
        """Return the seconds of computing with each bundle. Waits for the last of them.

        In a step that was disturbed the fastest of like bundles says what all of them take.
        """
        self.end()
        found: dict[Bundle, float] = {}
        for bundle, start, end in self._computed:
            end.synchronize()
            found[bundle] = found.get(bundle, 0.0) + self.backend.seconds_between(start, end)
        return of_the_fastest(found) if self.disturbed else found

    def bus(self) -> float | None:
        """Return the bytes a second that the bus carries; None where no transfer was long enough.

        Transfers on two streams take turns on it, so those that overlap are counted as one.
        """
        sent = list(self._sent)
        for _, _, end in sent:
            end.synchronize()
        since = sent[0][1] if sent else None
        moments = [(self.backend.seconds_between(since, start), end, nbytes) for nbytes, start, end in sent]
        moments.sort(key=lambda moment: moment[0])
        rates: list[float] = []
        began = ended = 0.0
        carried = count = 0
        for start, end, nbytes in [*moments, (float("inf"), None, 0)]:
            if count and start >= ended:
                rates += count * [carried / max(1e-9, ended - began)]
                carried = count = 0
            if end is not None:
                ended_now = self.backend.seconds_between(since, end)
                began, ended = (began, max(ended, ended_now)) if count else (start, ended_now)
                carried, count = carried + nbytes, count + 1
        rates.sort()
        return rates[int(QUANTILE * (len(rates) - 1))] if rates else None


def of_the_fastest(seconds: dict[Bundle, float]) -> dict[Bundle, float]:
    """Give each bundle the seconds of the fastest of its kind and size."""
    kinds = {bundle: (kind_and_number(bundle)[0], bundle.nbytes) for bundle in seconds}
    fastest: dict[tuple[str, int], float] = {}
    for bundle, kind in kinds.items():
        fastest[kind] = min(seconds[bundle], fastest.get(kind, seconds[bundle]))
    return {bundle: fastest[kind] for bundle, kind in kinds.items()}
