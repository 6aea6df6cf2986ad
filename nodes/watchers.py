"""Sends each report to the pages that look at the moment, as one websocket event. Nothing is sent while none looks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ..ops.never_raises import never_raises
from .shared_report import SharedReport

EVENT = "spillway.state"
# A page says again that it looks, several times in this. One that is gone says nothing.
LOOK_SECONDS = 15.0
MOST_PAGES = 32
# A page that takes longer to take a message sleeps.
SEND_SECONDS = 5.0


class Watchers:
    """Keeps the pages that look, by their client id, and sends while there are any. One event loop calls it.

    socket_of: gives the open websocket of a client, or None.
    """

    def __init__(self, report: SharedReport, socket_of: Callable[[str], Any]) -> None:
        self.report, self.socket_of = report, socket_of
        self._until: dict[str, float] = {}
        self._sending: asyncio.Task[None] | None = None

    @property
    def count(self) -> int:
        """Count the pages that look now."""
        return len(self._looking())

    def look(self, client: str) -> bool:
        """Note that a page looks, for a while. Returns False where too many do."""
        if client not in self._until and self.count >= MOST_PAGES:
            return False
        self._until[client] = time.monotonic() + LOOK_SECONDS
        if self._sending is None or self._sending.done():
            self._sending = asyncio.ensure_future(self._send())
        return True

    def leave(self, client: str) -> None:
        """Note that a page looks no more."""
        self._until.pop(client, None)

    def _looking(self) -> list[str]:
        now = time.monotonic()
        for client in [client for client, until in self._until.items() if until < now or not self.socket_of(client)]:
            del self._until[client]
        return list(self._until)

    @never_raises("sending the state of memory to pages")
    async def _send(self) -> None:
        """Send each report until nobody looks. An error ends it, and the next page that looks begins it anew."""
        while self._looking():
            text = await self.report.get()
            message = f'{{"type": "{EVENT}", "data": {text.decode()}}}'
            await asyncio.gather(*(self._send_to(client, message) for client in self._looking()))

    async def _send_to(self, client: str, message: str) -> None:
        try:
            await asyncio.wait_for(self.socket_of(client).send_str(message), SEND_SECONDS)
        except (OSError, RuntimeError, asyncio.TimeoutError):  # it has closed, or sleeps
            self.leave(client)
