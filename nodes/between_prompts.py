"""Holds off the next prompt while something is done that no prompt may meet.

ComfyUI's queue has a lock that would do, but the server's event loop waits for it at each request.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_gate = threading.Lock()


def install() -> bool:
    """Have each prompt wait at its beginning. Returns False where this executor is not known. Twice is once."""
    executor = getattr(sys.modules.get("execution"), "PromptExecutor", None)
    if executor is None or hasattr(executor.execute, "spillway_gate"):
        return executor is not None
    original: Callable[..., Any] = executor.execute

    @functools.wraps(original)
    def execute(*args: Any, **kwargs: Any) -> Any:
        # The queue counts the prompt as running by now. So nobody begins anything, and this waits for who has.
        with _gate:
            pass
        return original(*args, **kwargs)

    execute.spillway_gate = True  # type: ignore[attr-defined]
    executor.execute = execute
    return True


def _is_installed() -> bool:
    executor = getattr(sys.modules.get("execution"), "PromptExecutor", None)
    return hasattr(getattr(executor, "execute", None), "spillway_gate")


@contextmanager
def held_off(queue: Any) -> Iterator[bool]:
    """Let no prompt begin inside. Gives whether one runs already, which then goes on."""
    with _gate:
        if not _is_installed():  # prompts do not wait at their beginning, and the queue's lock keeps them from it
            with queue.mutex:
                yield bool(queue.currently_running)
            return
        with queue.mutex:
            running = bool(queue.currently_running)
        yield running
