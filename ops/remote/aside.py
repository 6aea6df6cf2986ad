"""A call that another thread makes, so that whoever wants its result can stop waiting for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Aside(Generic[T]):
    """Begins a call in a thread of this name. The thread is left alone where nobody waits for it any more."""

    def __init__(self, call: Callable[[], T], name: str) -> None:
        self._call = call
        self._done: list[tuple[T | None, BaseException | None]] = []
        self._thread = threading.Thread(target=self._make, name=name, daemon=True)
        self._thread.start()

    def _make(self) -> None:
        try:
            self._done.append((self._call(), None))
        except BaseException as error:
            self._done.append((None, error))

    def wait(self, seconds: float) -> bool:
        """Wait for the end, so long at most. Say whether it has ended."""
        self._thread.join(seconds)
        return bool(self._done)

    def result(self) -> T:
        """Return the result of a call that has ended, or raise its error."""
        result, error = self._done[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]
