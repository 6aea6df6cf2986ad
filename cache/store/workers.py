"""Threads that ask a store. One that hangs there holds up nobody, the end of the process included."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

IDLE_SECONDS = 60.0


class Workers:
    """At most `most` daemon threads, begun when there is work for them. They end when there is none for a while.

    Python waits at its end for the threads of `concurrent.futures`, so one that a network drive never answers would
    keep the process from ending.
    """

    def __init__(self, most: int, name: str) -> None:
        self.most, self.name = most, name
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._threads = self._idle = 0
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Do some work in a thread. What is cancelled before it began is not done."""
        future: Future[Any] = Future()
        with self._lock:
            self._work.put((future, work))
            if self._idle < self._work.qsize() and self._threads < self.most:
                self._threads += 1
                threading.Thread(target=self._run, name=self.name, daemon=True).start()
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            try:
                future, work = self._work.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    self._idle -= 1
                    if self._work.empty():
                        self._threads -= 1
                        return
                continue
            with self._lock:
                self._idle -= 1
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            del future, work  # else this would keep the result until there is more work
