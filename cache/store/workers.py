"""Threads that ask a store. One that hangs there holds up nobody, the end of the process included."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

IDLE_SECONDS = 60.0

Work = tuple[Future[Any], Callable[[], Any]]


class Workers:
    """At most `most` daemon threads, begun when there is work for them. They end when there is none for a while.

    Python waits at its end for the threads of `concurrent.futures`, so one that a network drive never answers would
    keep the process from ending.
    """

    def __init__(self, most: int, name: str) -> None:
        self.most, self.name = most, name
        self._work: deque[Work] = deque()
        self._threads = self._idle = 0  # idle: those that wait for work, and have not taken any
        self._changed = threading.Condition()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Do some work in a thread. What is cancelled before it began is not done."""
        future: Future[Any] = Future()
        with self._changed:
            self._work.append((future, work))
            if self._idle < len(self._work) and self._threads < self.most:
                self._threads += 1
                threading.Thread(target=self._run, name=self.name, daemon=True).start()
            self._changed.notify()
        return future

    def _take(self) -> Work | None:
        """Take work. None where there is none for a while, and then the thread ends.

        Work is taken and the idle are counted at once. Else a thread that has just taken some would count as idle, and
        what is submitted next would wait for it.
        """
        with self._changed:
            self._idle += 1
            there = self._changed.wait_for(lambda: self._work, IDLE_SECONDS)
            self._idle -= 1
            if there:
                return self._work.popleft()
            self._threads -= 1
            return None

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            future, work = taken
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            del taken, future, work  # else this would keep the result until there is more work
