"""Patterns of bytes, and work that keeps a device busy while they travel."""

from __future__ import annotations

import functools
import time

import numpy
import torch

from ...ops.device.backend import Backend
from ...ops.errors import SpillwayError

# A prime, so that no two pages of a pattern are alike.
PERIOD = 1_048_583
LARGEST = 1 << 20
# Multiplications at a time, and their widths. A device must still be busy when the copies behind them begin. Where one
# of width TRIED takes more than SLOW seconds, small ones do: no GPU is so slow.
KERNELS, LARGE, TRIED, SMALL = 4, 1024, 512, 32
SLOW = 0.001


class Wrong(SpillwayError, Exception):
    """Says what a device gave back, and what was expected."""


@functools.cache
def _base() -> torch.Tensor:
    generator = torch.Generator().manual_seed(12)
    once = torch.randint(0, 256, (PERIOD,), dtype=torch.uint8, generator=generator)
    return torch.cat([once, once[:LARGEST]])


def pattern(nbytes: int, seed: int) -> torch.Tensor:
    """Return up to LARGEST bytes, to read only. They differ by seed, and from one page to the next."""
    start = seed * 40_009 % PERIOD
    return _base()[start : start + nbytes]


def fill(host: torch.Tensor, wanted: torch.Tensor) -> None:
    """Copy bytes within host memory, in this thread alone."""
    host.numpy()[:] = wanted.numpy()


def compare(what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise Wrong where bytes in host memory are not those expected."""
    if numpy.array_equal(got.numpy(), wanted.numpy()):  # torch would use all threads, which cost more than they save
        return
    at = int((got != wanted).nonzero()[0])
    count = int((got != wanted).sum())
    raise Wrong(
        f"{what}: {count} of {wanted.numel()} bytes came back wrong, the first at {at} ({int(got[at])} instead of "
        f"{int(wanted[at])})"
    )


class Load:
    """Kernels on the main stream of a device."""

    def __init__(self, backend: Backend) -> None:
        width = _width(backend)
        self.matrix = torch.full((width, width), 1 / width, device=backend.device)

    def run(self) -> None:
        """Queue some, each behind the one before."""
        for _ in range(KERNELS):
            self.matrix = self.matrix @ self.matrix


def _width(backend: Backend) -> int:
    """Return the width of products that a device is busy with for a while. A slow device gets small ones."""
    if backend.device.type == "cpu":
        return SMALL
    matrix = torch.ones((TRIED, TRIED), device=backend.device)
    for _ in range(2):  # the first loads libraries
        backend.synchronize()
        began = time.perf_counter()
        _ = matrix @ matrix
        backend.synchronize()
        seconds = time.perf_counter() - began
    return LARGE if seconds < SLOW else SMALL
