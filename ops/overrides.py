"""Sets attributes on other people's objects and puts them back. Replaces functions for one thread, or for all."""

from __future__ import annotations

import functools
import threading
import types
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
    """Stands in a function's place while anything overrides it, and sends each call on by its thread."""

    def __init__(self, owner: Any, name: str) -> None:
        stands = vars(owner).get(name) if isinstance(owner, type) else None
        of_class = isinstance(stands, classmethod)
        original: Callable[..., Any] = stands.__func__ if isinstance(stands, classmethod) else getattr(owner, name)
        by_thread: dict[int, list[Callable[..., Any]]] = {}
        everywhere: list[Callable[..., Any]] = []

        # A function, so that a method's switch binds to its object.
        def switch(*args: Any, **kwargs: Any) -> Any:
            call = original
            for by in (*everywhere, *by_thread.get(threading.get_ident(), ())):
                call = functools.partial(by, call)
            return call(*args, **kwargs)

        if isinstance(original, types.FunctionType):
            functools.update_wrapper(switch, original)  # packs look at a function's parameters before they call it
        self.by_thread, self.everywhere = by_thread, everywhere
        self._owner, self._name = owner, name
        self._stands: Any = classmethod(switch) if of_class else switch
        self._saved = SavedAttributes()
        self._saved.set(owner, name, self._stands)

    @property
    def is_used(self) -> bool:
        return bool(self.by_thread or self.everywhere)

    def remove(self) -> None:
        """Put the original back. A function that others have put around the switch since stays, and calls it so."""
        if getattr(self._owner, "__dict__", {}).get(self._name) is self._stands:
            self._saved.restore()


_lock = threading.Lock()
_switches: dict[tuple[int, str], _Switch] = {}


@contextmanager
def overridden(owner: Any, name: str, *, by: Callable[..., Any]) -> Iterator[None]:
    """Replace the function `owner.name` for this thread while the block runs.

    `by` gets the function that it replaces, then the arguments of the call. Other threads go on calling the original,
    or their own replacement. Inside a nested block, the inner `by` gets the outer one.
    """
    thread = threading.get_ident()
    with _lock:
        switch = _switch(owner, name)
        switch.by_thread.setdefault(thread, []).append(by)
    try:
        yield
    finally:
        with _lock:
            switch.by_thread[thread].remove(by)
            if not switch.by_thread[thread]:
                del switch.by_thread[thread]
            # The last thread puts the original back, also where another thread came first.
            _give_up_unused(owner, name)


def override_everywhere(owner: Any, name: str, *, by: Callable[..., Any]) -> Callable[[], None]:
    """Replace the function `owner.name` for all threads. Returns what puts it back, which is called once.

    `overridden` goes before it, in its thread. The original is back when no thread overrides the function any more.
    """
    with _lock:
        _switch(owner, name).everywhere.append(by)

    def put_back() -> None:
        with _lock:
            _switches[(id(owner), name)].everywhere.remove(by)
            _give_up_unused(owner, name)

    return put_back


def is_overridden(owner: Any, name: str) -> bool:
    """Say whether this thread is in a block that overrides the function."""
    switch = _switches.get((id(owner), name))
    return switch is not None and threading.get_ident() in switch.by_thread


def _switch(owner: Any, name: str) -> _Switch:
    key = (id(owner), name)
    if key not in _switches:
        _switches[key] = _Switch(owner, name)
    return _switches[key]


def _give_up_unused(owner: Any, name: str) -> None:
    key = (id(owner), name)
    if not _switches[key].is_used:
        _switches.pop(key).remove()
