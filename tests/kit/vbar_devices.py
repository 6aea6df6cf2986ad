"""The devices that the VBAR conformance suite runs on, and where the implementations rightly differ.

A process tests either the software VBAR or, where `cuda_sim.aimdo.VARIABLE` names a release, that of comfy-aimdo.
"""

from __future__ import annotations

from dataclasses import dataclass

from cuda_sim.aimdo import HEADROOM, PAGE, load_aimdo, version_under_test
from cuda_sim.aimdo_device import AimdoDevice
from kit.sim_device import SimDevice
from spillway.ops.ledger import Ledger
from spillway.ops.vbar import software as software_vbar
from spillway.ops.vbar.aimdo import AimdoVBAR
from spillway.ops.vbar.software import SoftwareVBAR, memory_of


@dataclass(frozen=True)
class Traits:
    """Where implementations rightly differ. Everything else that the suite states holds for all of them.

    unit: bytes of the smallest thing that can be evicted. comfy-aimdo maps pages, and slices may share one; in the
        software VBAR every slice is an allocation of its own, of any size.
    looks: faults until memory that other processes took is given up.
    reserves_below: under pressure a fault needs room for everything absent below it too, and may evict for it.
    strands: a fault may be granted while its own watermark sinks below it; what then lies above stays until prioritize.
    refuses_half_done: a fault that finds no room leaves what it mapped and evicted before it saw that as it is.
    """

    unit: int
    looks: int
    reserves_below: bool = False
    strands: bool = False
    refuses_half_done: bool = False


class SoftwareDevice:
    """A device with software VBARs. Sizes are in units."""

    traits = Traits(unit=1024, looks=software_vbar.LOOK_EVERY)
    unit = traits.unit

    def __init__(self, capacity=1000, headroom=0):
        self.backend = SimDevice(capacity * self.unit)
        self.headroom = headroom

    def vbar(self):
        return SoftwareVBAR(self.backend, self.headroom * self.unit)

    def others_take(self, units):
        self.backend.other = units * self.unit
        memory_of(self.backend)._polled = -1e9  # free memory is polled; do not wait for it

    def free(self):
        return self.backend.memory()[0] // self.unit

    def free_bytes(self):
        return self.backend.capacity - self.backend.other - self.held_bytes()

    def held_bytes(self):
        return sum(vbar.used for vbar in memory_of(self.backend).vbars)

    def round_limit(self, nbytes):
        return nbytes

    def blocks_of(self, piece):
        return [(piece.offset, piece.nbytes)]

    def resident_blocks(self, vbar):
        return {(piece.offset, piece.nbytes) for piece in vbar.slices if piece.serial}

    def write(self, memory, value):
        memory.fill_(value)

    def holds(self, memory, value):
        return bool((memory == value).all())

    def check_after(self):
        """What holds when a test has closed its VBARs, or dropped them."""
        assert self.held_bytes() == 0


class RealAimdo:
    """The same with comfy-aimdo's. Its headroom is its own, so it stands for the one that a test asks for."""

    unit = PAGE
    range_units = 40
    # Far more than any test uses: then only what is free decides, never its own count of what is used.
    total = 64 << 30

    def __init__(self, capacity=1000, headroom=0):
        self.aimdo = load_aimdo(version_under_test(), self.total)
        self.backend = AimdoDevice(self.aimdo.driver, self.aimdo)
        self.capacity, self.headroom = capacity, headroom
        self.others_take(0)

    @property
    def traits(self):
        old = self.aimdo.release < (0, 4, 13)
        return Traits(PAGE, looks=1, reserves_below=old, strands=old, refuses_half_done=True)

    def vbar(self):
        return AimdoVBAR(self.backend, self.range_units * PAGE, Ledger())

    def others_take(self, units):
        self.others = units
        self.aimdo.others_take(self.total - HEADROOM - (self.capacity - self.headroom - units) * PAGE)

    def free(self):
        return (self.backend.memory()[0] - HEADROOM) // PAGE + self.headroom

    def free_bytes(self):
        return (self.capacity - self.others) * PAGE - self.held_bytes()

    def held_bytes(self):
        return self.aimdo.driver.get("mapped")

    def round_limit(self, nbytes):
        return nbytes // PAGE * PAGE

    def blocks_of(self, piece):
        first, last = piece.offset // PAGE, (piece.offset + piece.nbytes - 1) // PAGE
        return [(page * PAGE, PAGE) for page in range(first, last + 1)]

    def resident_blocks(self, vbar):
        if vbar._vbar is None:
            return set()
        with software_vbar.lock:
            return {(page * PAGE, PAGE) for page, state in enumerate(vbar._vbar.get_residency()) if state & 1}

    # A page is real memory once it is written to, so only some of its bytes are.

    def write(self, memory, value):
        memory[:: PAGE // 4].fill_(value)

    def holds(self, memory, value):
        return bool((memory[:: PAGE // 4] == value).all())

    def check_after(self):
        assert not self.aimdo.driver.leaks()
        assert not self.aimdo.unlocked, self.aimdo.unlocked[0]


DEVICES = [SoftwareDevice] if version_under_test() is None else [RealAimdo]
