"""Frees what refers to itself, as a model's parts do."""

from __future__ import annotations

import gc
import time
import weakref

TRIES = 100
PAUSE_SECONDS = 0.02


class _Cycle:
    """Refers to itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def collect_garbage() -> bool:
    """Free all that nothing but itself refers to now. Returns False where that could not be had in two seconds.

    Python's gc.collect returns at once, with nothing done, while another thread collects, and that collection may have
    begun before something was let go here: gigabytes would stay until the next. So collect until a cycle made now is
    gone.
    """
    cycle = _Cycle()
    alive = weakref.ref(cycle)
    del cycle
    for _ in range(TRIES):
        gc.collect()
        if alive() is None:
            return True
        time.sleep(PAUSE_SECONDS)  # the other thread needs the interpreter's lock to get done
    return False
