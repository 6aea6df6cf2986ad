"""Allocates what stays apart from what comes and goes, so that the heap that steps compute in has no holes.

glibc gives each thread a heap of its own. The tensor of a weight that comes to stay while a layer computes takes a few
hundred bytes in the middle of a block that the next layer would need whole, and so each layer would take fresh pages.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

from . import allocator

T = TypeVar("T")


def apart(make: Callable[[], T]) -> T:
    """Return what `make` allocates in the heap of a thread of its own. Raises what it raises.

    Tensors are made without gradients and not of inference mode, whatever the caller is in. `make` must neither
    compute, which would start another team of torch's threads, nor wait for a lock, which the caller may hold.
    """
    if not allocator.has_heaps():
        return make()
    return _thread().submit(_without_gradients, make).result()


def _without_gradients(make: Callable[[], T]) -> T:
    with torch.no_grad():
        return make()


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "spillway-lasting")
