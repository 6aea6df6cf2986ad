"""Readers: threads that copy weights out of their files into host memory, and start their transfers.

The thread that launches kernels copies nothing. Python's lock is free while bytes are copied or read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# A core copies 2 to 8 GB/s, a bus takes 12 to 55. Half of the cores stay free for whoever launches, and for others.
MOST = 8


class Work(Protocol):
    """What a reader does."""

    def fill(self) -> None:
        """Wait until the host memory is free, and copy the bytes into it. May raise."""

    def undo(self) -> None:
        """Give back what was taken, after an error."""


class Job(Protocol):
    """Work that a reader has been given."""

    def wait(self) -> None:
        """Block this thread until the work has ended. Raises what it raised."""

    def cancel(self) -> None:
        """See to it that the work never begins, or has ended. Raises nothing of what the work raised."""

    def then(self, call: Callable[[], None]) -> Job:
        """Make the call when the work has ended well, in whatever thread knows first. Return it as a job."""


class Later(Protocol[T_co]):
    """What a slow call will return."""

    def ready(self) -> bool:
        """Say whether the call has ended."""

    def result(self) -> T_co:
        """Return what it returned, and wait for that. Raises what it raised."""


class Readers(Protocol):
    """Whoever does such work."""

    def submit(self, work: Work) -> Job:
        """Have it done, after what was submitted before has begun."""

    def aside(self, call: Callable[[], T]) -> Later[T]:
        """Make a slow call that nobody waits for. Two at a time, at most."""


def do(work: Work) -> None:
    """Do the work in this thread. After an error nothing is taken."""
    with torch.no_grad():
        try:
            work.fill()
        except BaseException:
            work.undo()
            raise


def _do_only(works: list[Work]) -> None:
    do(works.pop())


class _Done:
    """Work that was done at once."""

    def wait(self) -> None: ...

    def cancel(self) -> None: ...

    def then(self, call: Callable[[], None]) -> Job:
        call()
        return self


class Returned(Generic[T]):
    """A call that has been made."""

    def __init__(self, value: T) -> None:
        self._value = value

    def ready(self) -> bool:
        return True

    def result(self) -> T:
        return self._value


class Inline:
    """Does the work at once, in the thread that asks. For devices on which nothing runs beside that thread."""

    def submit(self, work: Work) -> Job:
        do(work)
        return _Done()

    def aside(self, call: Callable[[], T]) -> Later[T]:
        return Returned(call())


class _Promise:
    """Work of a thread."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()

    def cancel(self) -> None:
        if not self._future.cancel():
            self._future.exception()

    def then(self, call: Callable[[], None]) -> Job:
        following: Future[None] = Future()
        self._future.add_done_callback(partial(_follow, following, call))
        return _Promise(following)


def _follow(following: Future[None], call: Callable[[], None], done: Future[None]) -> None:
    if not following.set_running_or_notify_cancel():
        return
    try:
        done.result()
        call()
    except BaseException as error:
        following.set_exception(error)
    else:
        following.set_result(None)


class _Future(Generic[T]):
    """A call that a thread makes."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def ready(self) -> bool:
        return self._future.done()

    def result(self) -> T:
        return self._future.result()


class Threads:
    """Threads for all models of this process, as they share its memory and its disks."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, "spillway-reader")
        self._aside = ThreadPoolExecutor(2, "spillway-aside")

    def submit(self, work: Work) -> Job:
        # In a list that is emptied: else the pool would hold the work, and its memory, for a moment after its end.
        return _Promise(self._pool.submit(_do_only, [work]))

    def aside(self, call: Callable[[], T]) -> Later[T]:
        return _Future(self._aside.submit(call))


def reader_count() -> int:
    return max(1, min(MOST, (os.cpu_count() or 2) // 2))


@cache
def threads() -> Threads:
    """Return the readers of this process."""
    return Threads(reader_count())
