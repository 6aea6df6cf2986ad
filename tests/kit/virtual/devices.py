"""Cards and the machines around them, by what they attain: from data sheets and what others measured.

A bus attains four fifths of its nominal speed, matrix products half to two thirds of the nominal dense bf16 rate, VRAM
nine tenths. INT8 products attain 1.6 times the rate of bf16. A host thread copies at 6 to 12 GB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
GB = 1e9


@dataclass(frozen=True)
class Machine:
    """A card in a machine. Speeds are in bytes a second and operations a second."""

    name: str
    vram: int
    bus: float  # to the device
    flops: float  # bf16
    vram_speed: float
    memcpy: float  # one thread
    memcpy_all: float  # all threads together
    disk: float
    int8_gain: float = 1.6

    @property
    def back(self) -> float:
        return self.bus

    @property
    def locking(self) -> float:
        """Threads touch large pages, which zeroes them, ahead of the driver: 16 GB/s on a machine with an H100."""
        return min(16 * GB, self.memcpy_all / 2)

    @property
    def pageable(self) -> float:
        """The driver stages copies from pageable memory with one thread."""
        return min(self.bus, self.memcpy)


def _machine(
    name: str, vram: int, bus: float, tflops: float, vram_gbs: float, memcpy: float, memcpy_all: float, disk: float
) -> Machine:
    return Machine(name, vram * GIB, bus * GB, tflops * 1e12, vram_gbs * GB, memcpy * GB, memcpy_all * GB, disk * GB)


MACHINES = {
    machine.name: machine
    for machine in (
        _machine("3070 8GB gen3x8", 8, 6.3, 33, 400, 6, 14, 2.5),
        _machine("4060 8GB gen4x8", 8, 12.5, 45, 250, 9, 22, 3.3),
        _machine("3060 12GB gen4x16", 12, 24, 24, 320, 8, 20, 3.3),
        _machine("4060Ti 16GB gen4x8", 16, 12.5, 62, 260, 10, 26, 5),
        _machine("4090 24GB gen4x16", 24, 25, 110, 900, 10, 30, 6.5),
        _machine("5090 32GB gen5x16", 32, 52, 190, 1500, 12, 45, 10),
    )
}
