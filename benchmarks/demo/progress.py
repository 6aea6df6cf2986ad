"""Progress bars on stderr, so that stdout carries results only."""

from __future__ import annotations

import sys
import time

WIDTH = 28


class Bar:
    """One phase's progress: ``label [####    ] 3/4 note``. Use it as a context manager so that its line is ended."""

    def __init__(self, label: str, total: float, unit: str = "") -> None:
        self.label, self.total, self.unit = label, max(total, 1e-9), unit
        self.started = time.monotonic()
        self._drawn_at = 0.0
        self._length = 0
        # A log file is better off with one line per phase than with a thousand carriage returns.
        self._live = sys.stderr.isatty()
        self._line = ""

    def update(self, done: float, note: str = "") -> None:
        """Show ``done`` of the total; ``note`` is free text behind it."""
        share = min(done / self.total, 1.0)
        filled = int(share * WIDTH)
        amount = f"{done:g}/{self.total:g}{self.unit}"
        self._line = f"{self.label:<26} [{'#' * filled}{' ' * (WIDTH - filled)}] {amount} {note}".rstrip()
        now = time.monotonic()
        # The last state is always drawn; those before it at most ten times a second.
        if self._live and (share >= 1.0 or now - self._drawn_at > 0.1):
            self._drawn_at = now
            self._draw()

    def _draw(self) -> None:
        sys.stderr.write("\r" + self._line.ljust(self._length))
        sys.stderr.flush()
        self._length = len(self._line)

    def __enter__(self) -> Bar:
        self.update(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._line += f"  ({time.monotonic() - self.started:.1f} s)"
        if self._live:
            self._draw()
            sys.stderr.write("\n")
        else:
            sys.stderr.write(self._line + "\n")
        sys.stderr.flush()
