"""Allocates what stays apart from what comes and goes, so that the heap that steps compute in has no holes.

glibc gives each thread a heap of its own. The tensor of a weight that comes to stay while a layer computes takes a few
hundred bytes in the middle of a block that the next layer would need whole, and so each layer would take fresh pages.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TypeVar

import torch

from . import allocator

T = TypeVar("T")
OWN_MAP = 128 << 10  # bytes; from here on a block is a map of its own


def apart(make: Callable[[], T]) -> T:
    """Return what `make` allocates in the heap of a thread of its own. Raises what it raises.

    Tensors are made without gradients and not of inference mode, whatever the caller is in. `make` must neither
    compute, which would start another team of torch's threads, nor wait for a lock, which the caller may hold.
    """
    if not allocator.has_heaps():
        return _ordinary(make)
    return _thread().submit(_ordinary, make).result()


def memory_apart(nbytes: int) -> torch.Tensor:
    """Allocate host memory as uint8, with any content. A large block goes back to the system as the tensor is freed.

    Raises OSError or RuntimeError where the system refuses it.
    """
    return apart(partial(_memory, nbytes))


def _memory(nbytes: int) -> torch.Tensor:
    if nbytes < OWN_MAP or not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return torch.empty(nbytes, dtype=torch.uint8)
    # malloc would keep what is freed at the end of this thread's heap, which not even malloc_trim gives back.
    private = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(private, dtype=torch.uint8)


def _ordinary(make: Callable[[], T]) -> T:
    with torch.inference_mode(False), torch.no_grad():
        return make()


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "spillway-lasting")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_thread.cache_clear)  # the child has no thread, and would wait for it
