"""Checks that bytes travel right: by plain copies, through page-locked memory, and on side streams under load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...ops.device.backend import Backend
from .bytes import Load, Wrong, compare, fill, pattern

SIZES = (1, 513, 65_536, (1 << 19) + 512)
# Of the buffers that are under way at once. More of them than streams, of sizes that let one overtake another.
IN_FLIGHT = (1 << 20, 513, 1 << 19, 4099, 65_536, (1 << 19) + 512)
ROUNDS = 3

HostEmpty = Callable[[int], torch.Tensor]


def pageable(nbytes: int) -> torch.Tensor:
    """Return ordinary host memory."""
    return torch.empty(nbytes, dtype=torch.uint8)


def check_copies(backend: Backend) -> None:
    """Raise Wrong where plain copies from ordinary memory and back change bytes. Nothing works on such a device."""
    _there_and_back(backend, pageable, "plain copies")


def check_pinned(backend: Backend) -> None:
    """Raise Wrong where plain copies from and to page-locked memory change bytes."""
    _there_and_back(backend, backend.host_empty, "pinned memory")


def _there_and_back(backend: Backend, host_empty: HostEmpty, what: str) -> None:
    for nbytes in SIZES:
        host, device, ordinary = host_empty(nbytes), backend.empty(nbytes), pageable(nbytes)
        for seed in range(ROUNDS):  # the same memory again, with other bytes
            wanted = pattern(nbytes, seed)
            fill(host, wanted)
            backend.copy(device, host, None)
            backend.copy(ordinary, device, None)
            compare(f"{what}, to the device", ordinary, wanted)
            wanted = pattern(nbytes, seed + ROUNDS)
            fill(ordinary, wanted)
            backend.copy(device, ordinary, None)
            backend.copy(host, device, None)
            backend.synchronize()
            compare(f"{what}, from the device", host, wanted)


def check_streams(backend: Backend, host_empty: HostEmpty) -> None:
    """Raise Wrong where copies on side streams, ordered by events as a caster orders them, change bytes.

    host_empty: makes the host memory that they read and fill.
    """
    streams = [backend.stream() for _ in range(backend.streams)]
    load = Load(backend)
    ring = [_Buffers(backend, host_empty, nbytes) for nbytes in IN_FLIGHT]
    try:
        for turn in range(ROUNDS):
            for index, buffers in enumerate(ring):
                buffers.bring(streams[index % len(streams)], seed=turn * len(ring) + index)
                load.run()
            for buffers in ring:
                buffers.use()
                load.run()
            for buffers in ring:
                buffers.finish()
    finally:
        # Where one came back wrong, others are still under way. Without this wait they would write into what their
        # memory is used for next.
        backend.synchronize()


class _Buffers:
    """One buffer of a ring: bytes go to the device, the main stream uses them, and the result goes back."""

    def __init__(self, backend: Backend, host_empty: HostEmpty, nbytes: int) -> None:
        self.backend, self.nbytes = backend, nbytes
        self.staging, self.back = host_empty(nbytes), host_empty(nbytes)
        self.target, self.result = backend.empty(nbytes), backend.empty(nbytes)

    def bring(self, stream: Any, seed: int) -> None:
        self.stream, self.wanted = stream, pattern(self.nbytes, seed)
        fill(self.staging, self.wanted)
        self.back.numpy().fill(0)
        # Without this wait the copy would overwrite what the main stream still reads of the round before.
        self.backend.wait(self.backend.record(None), stream)
        self.backend.copy(self.target, self.staging, stream)
        self.here = self.backend.record(stream)

    def use(self) -> None:
        self.backend.wait(self.here, None)
        torch.bitwise_not(self.target, out=self.result)
        self.backend.wait(self.backend.record(None), self.stream)
        self.backend.copy(self.back, self.result, self.stream)
        self.done = self.backend.record(self.stream)

    def finish(self) -> None:
        if self.done is None:
            raise Wrong("side streams: no event was recorded")
        self.done.synchronize()
        compare("side streams", self.back, torch.from_numpy(~self.wanted.numpy()))
