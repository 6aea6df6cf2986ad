"""One report for all who ask, so that asking without pause costs no prompt anything."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

INTERVAL_SECONDS = 0.25
MOST_SECONDS = 2.0  # that anybody waits for one to be begun, however dear it is
# Making reports takes at most this part of one core. It holds Python's lock, which the running prompt needs too.
SHARE = 1 / 400


class SharedReport:
    """Makes a report when somebody asks, once an interval at most. Whoever asks gets the next one that is made.

    So nobody gets a report of before they asked. make: runs in another thread, and gives data for JSON.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self._next: asyncio.Task[bytes] | None = None
        self._one_at_a_time = asyncio.Lock()
        self._due = 0.0

    async def get(self) -> bytes:
        """Return the next report as JSON. Raises what making it raised."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._made())
        # A client that hangs up must not take the report from the others.
        return await asyncio.shield(self._next)

    async def _made(self) -> bytes:
        async with self._one_at_a_time:
            await asyncio.sleep(self._due - time.monotonic())
            self._next = None  # from here on, whoever asks gets the one after this
            cost = 0.0
            try:
                text, cost = await asyncio.get_running_loop().run_in_executor(None, self._text)
            finally:
                self._due = time.monotonic() + min(MOST_SECONDS, max(INTERVAL_SECONDS, cost / SHARE))
            return text

    def _text(self) -> tuple[bytes, float]:
        begun = time.thread_time()
        text = json.dumps(self.make()).encode()
        return text, time.thread_time() - begun
