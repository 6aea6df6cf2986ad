"""What a machine allows at best: the longest of computing, transferring and reading, all of them at once.

A step must transfer what the budget cannot hold. Page-locked RAM holds as much of that as there is beside the reserve
that pins leave to others, and the rest is read from the disk, as the RAM is full then. Of a table only the rows that
are asked for count. The first step reads and transfers everything.
"""

from __future__ import annotations

from dataclasses import dataclass

from kit.virtual.devices import GIB, Machine
from spillway.patcher.ram_pressure import ram_reserve_of

from .work import Work

SYSTEM_BYTES = 4 * GIB  # of the RAM, for the system, ComfyUI and the other models


@dataclass(frozen=True)
class Limits:
    """Seconds. pinned: bytes that RAM can hold of those that are transferred at each step."""

    step: float
    first: float
    pinned: int


def ram_for_weights(ram_gb: int) -> int:
    return ram_gb * GIB - SYSTEM_BYTES


def limits(work: Work, machine: Machine, ram_gb: int, budget: int) -> Limits:
    """Return the limits of a model in `budget` bytes of the device."""
    ram = ram_for_weights(ram_gb) - ram_reserve_of(ram_gb * GIB)
    needed = sum(op.asked for op in work.ops)
    offloaded = max(0, needed - budget)
    pinned = min(offloaded, ram)
    left = offloaded - pinned
    # What has no place in RAM comes as the file has it, and is made again at each use.
    first_bytes = sum(op.source * op.asked / op.nbytes for op in work.ops)
    growth = first_bytes / needed
    making = sum(op.making for op in work.ops)
    compute = work.compute + making * left / work.nbytes
    step = max(compute, (pinned + left * growth) / machine.bus, left * growth / machine.disk)
    reads = machine.memcpy_all if work.source <= ram_for_weights(ram_gb) else machine.disk
    first = max(work.compute + making, first_bytes / machine.bus, first_bytes / reads)
    return Limits(step, first, pinned)
