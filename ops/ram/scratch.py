"""Host memory that is used again and again, for numbers that live as long as one operation.

Memory that the system has just given is cleared page by page as it is first written into, which costs a CPU more than
making the numbers of a quantised weight does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .apart import memory_apart


class Scratch:
    """Blocks that are lent one by one. Nothing may refer to their memory once they were given back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[torch.Tensor] = []

    def take(self, nbytes: int) -> torch.Tensor:
        """Lend a block of at least `nbytes`, with any content, as uint8.

        It is one that is idle and large enough, or a new one in the place of one that is too small. So there are never
        more blocks than were lent at the same time, and none is larger than what was asked for.
        """
        with self._lock:
            fitting = [place for place, block in enumerate(self._idle) if block.numel() >= nbytes]
            if fitting:
                return self._idle.pop(min(fitting, key=lambda place: self._idle[place].numel()))
            if self._idle:
                self._idle.pop()
        return memory_apart(nbytes)

    def give_back(self, block: torch.Tensor) -> None:
        with self._lock:
            self._idle.append(block)

    @contextmanager
    def lent(self, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Lend a tensor in host memory, with any content."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        block = self.take(nbytes)
        try:
            yield block[:nbytes].view(dtype).view(shape)
        finally:
            self.give_back(block)

    def idle_bytes(self) -> int:
        """Return the bytes that nobody is lent now."""
        return sum(block.numel() for block in self._idle)

    def release(self) -> int:
        """Give the memory that is idle back to the system. Return its bytes."""
        with self._lock:
            freed = self.idle_bytes()
            self._idle.clear()
        return freed


numbers = Scratch()  # of weights in blocks, of all models
