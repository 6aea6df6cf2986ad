"""Looks at the memory panel while prompts sample: a page in Chromium, or a client that only asks what the page asks."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from pathlib import Path
from typing import Protocol

TAB = "Workspace.ToggleSidebarTab.spillway-memory"
READY = "window.app?.extensionManager?.sidebarTab?.sidebarTabs.some((tab) => tab.id === 'spillway-memory')"
COUNT = """() => {
  window.reports = 0;
  window.comfyAPI.api.api.addEventListener("spillway.state", () => (window.reports += 1));
}"""
SETTLE_S = 1.5
AGAIN_S = 5.0  # as the page says that it still looks


class Viewer(Protocol):
    """Opens and closes the panel, and counts the reports that it was sent."""

    def show(self, is_open: bool) -> None: ...

    def reports(self) -> int: ...

    def close(self) -> None: ...


class Page:
    """ComfyUI's page in Chromium on the same machine, whose cores it shares."""

    def __init__(self, base: Path, port: int) -> None:
        from playwright.sync_api import sync_playwright

        from kit.comfyui.panel_page import ARGUMENTS

        self._playwright = sync_playwright().start()
        self._running = self._playwright.chromium.launch(
            executable_path=os.environ["SPILLWAY_CHROMIUM"], args=ARGUMENTS
        )
        self._page = self._running.new_page(viewport={"width": 1400, "height": 1000})
        self._page.goto(f"http://127.0.0.1:{port}/")
        self._page.wait_for_function(READY, timeout=180_000)
        self._page.evaluate(COUNT)
        self._open = False

    def show(self, is_open: bool) -> None:
        if is_open != self._open:
            self._page.evaluate(f"window.app.extensionManager.command.execute({TAB!r})")
            self._open = is_open
        self._page.wait_for_timeout(SETTLE_S * 1e3)

    def reports(self) -> int:
        return self._page.evaluate("window.reports")

    def close(self) -> None:
        self._running.close()
        self._playwright.stop()


class Socket:
    """A websocket that takes whatever the server sends, and says that it looks as the page does. Draws nothing."""

    def __init__(self, base: Path, port: int) -> None:
        self._address, self._count, self._open = f"http://127.0.0.1:{port}", 0, False
        self._loop, self._ready, self._end = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._connect(),), daemon=True)
        self._thread.start()
        if not self._ready.wait(60):
            raise TimeoutError("the server took no websocket")

    async def _connect(self) -> None:
        import aiohttp

        client = "panel-bench"
        async with aiohttp.ClientSession(self._address) as session, session.ws_connect(f"/ws?clientId={client}") as ws:
            self._say = lambda looks: session.post("/spillway/look", json={"client_id": client, "looks": looks})
            again = asyncio.ensure_future(self._say_again())
            self._ready.set()
            end = asyncio.ensure_future(self._end.wait())
            while not self._end.is_set():
                message = asyncio.ensure_future(ws.receive())
                await asyncio.wait({message, end}, return_when=asyncio.FIRST_COMPLETED)
                if message.done() and message.result().type == aiohttp.WSMsgType.TEXT:
                    self._count += json.loads(message.result().data)["type"] == "spillway.state"
                elif not message.done():
                    message.cancel()
            again.cancel()

    async def _say_again(self) -> None:
        while True:
            await asyncio.sleep(AGAIN_S)
            if self._open:
                await self._look(True)

    async def _look(self, looks: bool) -> None:
        async with self._say(looks) as answer:
            answer.raise_for_status()

    def show(self, is_open: bool) -> None:
        if is_open != self._open:
            self._open = is_open
            asyncio.run_coroutine_threadsafe(self._look(is_open), self._loop).result(60)
        time.sleep(SETTLE_S)

    def reports(self) -> int:
        return self._count

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(60)


VIEWERS = {"chromium": Page, "socket": Socket}
