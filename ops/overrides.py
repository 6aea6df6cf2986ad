"""Sets attributes on other people's objects and puts them back. Replaces functions for one thread for a while."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Stands for an attribute that did not exist, since None is a value that an attribute can have.
MISSING = object()


class SavedAttributes:
    """Sets attributes and remembers their old values, also where they did not exist."""

    def __init__(self) -> None:
        self._saved: dict[tuple[int, str], tuple[Any, Any]] = {}

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute. `restore` puts the present state back."""
        before = getattr(target, "__dict__", {}).get(name, MISSING)
        self._saved.setdefault((id(target), name), (target, before))
        setattr(target, name, value)

    def restore(self) -> None:
        """Put every attribute back as it was before its first `set`."""
        for (_, name), (target, before) in self._saved.items():
            if before is not MISSING:
                setattr(target, name, before)
            elif name in getattr(target, "__dict__", {}):
                delattr(target, name)
        self._saved.clear()


class _Switch:
    """Stands in a function's place while any thread overrides it, and sends each call on by its thread."""

    def __init__(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)
        by_thread: dict[int, list[Callable[..., Any]]] = {}

        # A function, so that a method's switch binds to its object.
        def switch(*args: Any, **kwargs: Any) -> Any:
            call = original
            for by in by_thread.get(threading.get_ident(), ()):
                call = functools.partial(by, call)
            return call(*args, **kwargs)

        self.by_thread = by_thread
        self._saved = SavedAttributes()
        self._saved.set(owner, name, switch)

    def remove(self) -> None:
        self._saved.restore()


_lock = threading.Lock()
_switches: dict[tuple[int, str], _Switch] = {}


@contextmanager
def overridden(owner: Any, name: str, *, by: Callable[..., Any]) -> Iterator[None]:
    """Replace the function `owner.name` for this thread while the block runs.

    `by` gets the function that it replaces, then the arguments of the call. Other threads go on calling the original,
    or their own replacement. Inside a nested block, the inner `by` gets the outer one.
    """
    key, thread = (id(owner), name), threading.get_ident()
    with _lock:
        switch = _switches.get(key)
        if switch is None:
            switch = _switches[key] = _Switch(owner, name)
        switch.by_thread.setdefault(thread, []).append(by)
    try:
        yield
    finally:
        with _lock:
            switch.by_thread[thread].remove(by)
            if not switch.by_thread[thread]:
                del switch.by_thread[thread]
            # The last thread puts the original back, also where another thread came first.
            if not switch.by_thread:
                switch.remove()
                del _switches[key]
