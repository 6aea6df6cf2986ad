"""Finds missing waits: a computation before its weights have come, a copy into memory that is still read."""

from __future__ import annotations

from bisect import bisect_right, insort

import torch


class Hazard(AssertionError):
    """Something ran too early."""


class Hazards:
    """Watches device memory by address. Times are those of the clock."""

    def __init__(self) -> None:
        self._starts: list[int] = []  # of the memory that copies went to
        self._arrived: dict[int, tuple[int, float]] = {}  # start -> (end, when the bytes are there)
        self._read: dict[int, tuple[int, float]] = {}  # start -> (end, until when it is read)

    def arrives(self, target: torch.Tensor, starts: float, ends: float) -> None:
        """Note that a copy into `target` is under way then. Raises Hazard where a computation still reads it."""
        start = target.data_ptr()
        end = start + target.numel() * target.element_size()
        for first, (last, until) in list(self._read.items()):
            if until <= starts + 1e-12:
                del self._read[first]
            elif first < end and start < last:
                raise Hazard(f"a copy that begins at {starts:.9f} overwrites what is read until {until:.9f}")
        if start not in self._arrived:
            insort(self._starts, start)
        self._arrived[start] = (end, ends)

    def is_read(self, weight: torch.Tensor, starts: float, ends: float) -> None:
        """Note that a computation reads a weight then. Raises Hazard where its bytes are not there yet."""
        start = weight.data_ptr()
        index = bisect_right(self._starts, start) - 1
        if index >= 0:
            end, arrived = self._arrived[self._starts[index]]
            if start < end and arrived > starts + 1e-12:
                raise Hazard(f"a computation at {starts:.9f} reads what arrives at {arrived:.9f}")
        self._read[start] = (start + weight.numel() * weight.element_size(), ends)
