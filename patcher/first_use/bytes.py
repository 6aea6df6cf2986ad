"""Patterns of bytes, and work that keeps a device busy while they travel."""

from __future__ import annotations

import functools

import torch

from ...ops.device.backend import Backend

# A prime, so that no two pages of a pattern are alike.
PERIOD = 1_048_583
LARGEST = 1 << 20
# Multiplications at a time, and their size. A device of its own must still be busy when the copies behind them begin.
KERNELS, WIDTH, WIDTH_ON_CPU = 8, 1024, 64


class Wrong(Exception):
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


def compare(what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise Wrong where bytes in host memory are not those expected."""
    if torch.equal(got, wanted):
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
        width = WIDTH_ON_CPU if backend.device.type == "cpu" else WIDTH
        self.matrix = torch.full((width, width), 1 / width, device=backend.device)

    def run(self) -> None:
        """Queue some, each behind the one before."""
        for _ in range(KERNELS):
            self.matrix = self.matrix @ self.matrix
