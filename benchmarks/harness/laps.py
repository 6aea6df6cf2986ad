"""A contestant's side of a race: wait for the turn, run one timed lap, tell the seconds, wait again."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from .memory import Peak, anonymous_bytes, peak_rss

TURN = "turn\n"


class Laps:
    """The line to the parent. Make it before anything that prints."""

    def __init__(self) -> None:
        # Libraries print to stdout. The line to the parent is a copy of it, and theirs leads to stderr.
        self._line = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._label, self._rss = "", 0
        self._began = self._began_cpu = self._seconds = self._cpu_seconds = 0.0
        self._anonymous: Peak | None = None
        self._begun_rss = 0

    def begin(self, label: str) -> None:
        """Wait for this contestant's turn and start the clock."""
        if sys.stdin.readline() != TURN:
            raise SystemExit(0)  # the parent needs no more of us, or is gone
        if self._anonymous is None:
            self._begun_rss = psutil.Process().memory_info().rss
            self._anonymous = Peak(anonymous_bytes)
            self._anonymous.start()
        self._label, self._began_cpu, self._began = label, time.process_time(), time.perf_counter()

    def stop(self) -> None:
        """Stop the clock. The turn goes on."""
        self._seconds = time.perf_counter() - self._began
        self._cpu_seconds = time.process_time() - self._began_cpu
        self._rss = psutil.Process().memory_info().rss

    def tell(self, **more: Any) -> None:
        """End the turn and say how long it took."""
        self._send(
            lap=self._label,
            seconds=self._seconds,
            cpu_seconds=self._cpu_seconds,
            rss=self._rss,
            begun_rss=self._begun_rss,
            peak_rss=peak_rss(),
            begun_anonymous=self._anonymous and self._anonymous.begun,
            peak_anonymous=self._anonymous and self._anonymous.peak,
            **more,
        )

    @contextlib.contextmanager
    def lap(self, label: str) -> Iterator[None]:
        """Take one timed turn."""
        self.begin(label)
        yield
        self.stop()
        self.tell()

    def fail(self, error: BaseException) -> None:
        """Say why this contestant cannot go on."""
        text = str(error).strip().splitlines() or [""]
        self._send(failed=f"{type(error).__name__}: {text[0]}")

    def _send(self, **message: Any) -> None:
        self._line.write(json.dumps(message) + "\n")


def contest(body: Callable[[Laps], None]) -> int:
    """Run a contestant's body to its end, and tell the parent what it raises."""
    laps = Laps()
    try:
        body(laps)
    except Exception as error:
        traceback.print_exc()
        laps.fail(error)
    return 0
