"""The line between calls that may raise and calls that may not.

An error inside a node's execution ends that prompt, and its author is told. Outside of a node's execution (as a prompt
starts or ends, in the output cache, when an object dies, at start-up) nobody catches an error. It would end the thread
that runs prompts, and the server would answer for ever without running any.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any

from .ledger import Ledger, first_line

log = logging.getLogger("spillway")

# Causes that were logged, as (what, error, file, line).
_logged: set[tuple[str, str, str, int]] = set()


def _nothing(*_: Any, **__: Any) -> None:
    return None


class never_raises:
    """Log errors instead of raising them. Interrupts and exits still pass.

    what: the call that failed, for people. otherwise: called with the function's arguments, returns the result in its
    place. unless: where it returns True the error is raised after all, since a node is running and its author must see
    the error. The ledger of the first argument, where there is one, gets a line too.
    """

    def __init__(
        self, what: str, otherwise: Callable[..., Any] = _nothing, *, unless: Callable[[], bool] = lambda: False
    ) -> None:
        self.what, self.otherwise, self.unless = what, otherwise, unless

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def waited(*arguments: Any, **named: Any) -> Any:
                try:
                    return await function(*arguments, **named)
                except Exception as error:
                    return self._instead(error, arguments, named)

            return waited

        @functools.wraps(function)
        def called(*arguments: Any, **named: Any) -> Any:
            try:
                return function(*arguments, **named)
            except Exception as error:
                return self._instead(error, arguments, named)

        return called

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or self.unless():
            return False
        self._report(error)
        return True

    def _instead(self, error: Exception, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self.unless():
            raise error
        self._report(error, *arguments[:1])
        return self.otherwise(*arguments, **named)

    def _report(self, error: Exception, owner: Any = None) -> None:
        words = f"{self.what} failed ({type(error).__name__}: {first_line(error)}); the server goes on without it."
        ledger = _ledger_of(owner)
        if ledger is not None:
            ledger.decide_once(words)
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        file, line = (place.tb_frame.f_code.co_filename, place.tb_lineno) if place is not None else ("", 0)
        cause = (self.what, type(error).__name__, file, line)
        if cause not in _logged:
            _logged.add(cause)
            log.error("[Spillway] %s Please report it.", words, exc_info=error)


def _ledger_of(owner: Any) -> Ledger | None:
    try:
        ledger = getattr(owner, "ledger", None)
    except Exception:  # the failed call may be the way to the ledger
        return None
    return ledger if isinstance(ledger, Ledger) else None
