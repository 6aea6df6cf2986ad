"""Host memory that is used again and again, for numbers that live as long as one operation.

Memory that the system has just given is cleared page by page as it is first written into, which costs a CPU more than
making the numbers of a quantised weight does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_idle: list[torch.Tensor] = []


@contextmanager
def lent(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Lend a tensor in host memory, with any content. Nothing may refer to its memory once it was given back."""
    numel = torch.Size(shape).numel()
    block = _take(numel * dtype.itemsize)
    try:
        yield block[: numel * dtype.itemsize].view(dtype).view(shape)
    finally:
        with _lock:
            _idle.append(block)


def _take(nbytes: int) -> torch.Tensor:
    """Return a block that is idle and large enough, or a new one in the place of one that is too small.

    So there are never more blocks than were lent at the same time, and none is larger than what was asked for.
    """
    with _lock:
        fitting = [place for place, block in enumerate(_idle) if block.numel() >= nbytes]
        if fitting:
            return _idle.pop(min(fitting, key=lambda place: _idle[place].numel()))
        if _idle:
            _idle.pop()
    # Not of inference mode: whoever is lent it next may not be in it.
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8)


def release() -> int:
    """Give the memory that is idle back to the system. Return its bytes."""
    with _lock:
        freed = sum(block.numel() for block in _idle)
        _idle.clear()
    return freed
