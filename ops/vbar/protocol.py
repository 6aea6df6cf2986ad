"""The VBAR protocol: a reserved range of device addresses whose memory comes on demand and can be taken back.

A bundle is allocated a slice once. `fault` precedes each use and answers with a signature, or None where there is no
room. While the signature stays the same, the data written under it is still there. `unpin` follows each use. The
highest slice is evicted first. An eviction lowers the watermark, above which faults fail until `prioritize`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

# Native VBAR calls from two threads on one device crash. The software VBARs of a device share a count of free memory,
# which two threads would get wrong.
lock = threading.RLock()

Signature = Any


class VBAR(Protocol):
    """The calls of the caster and the residency; every implementation passes tests/vbar. All sizes in bytes.

    kind: its name in reports. rank: the VBAR of lower rank is evicted from first. unit: bytes that come and go
    together. failure: why every fault is refused from now on, in the driver's words; None while all is well.
    follows_free_memory: the VBAR gives way by itself when the computation allocates, so nobody need tell it how much
    that will be. headroom: bytes that stay free while weights come; the residency plans with more. backend: its device.
    """

    kind: str
    rank: int
    unit: int
    failure: str | None
    follows_free_memory: bool
    headroom: int
    backend: Any

    def alloc(self, nbytes: int, on_evict: Callable[[], None]) -> Any:
        """Reserve addresses above all earlier allocations and map none. Return a slice; None where the range is full.

        on_evict: called when the slice's memory is taken back, by the implementations that can tell.
        """

    def fault(self, vbar_slice: Any) -> Signature | None:
        """Map the memory of a slice and pin it. Return None, with no pin, where there is no room or no slice."""

    def same(self, signature: Signature, other: Signature | None) -> bool:
        """Say whether nothing was evicted between two faults of one slice."""

    def unpin(self, vbar_slice: Any) -> None:
        """End one use of a faulted slice."""

    def tensor(self, vbar_slice: Any) -> torch.Tensor:
        """Return the memory of a faulted slice as 1-D uint8."""

    def drop_tensor(self, vbar_slice: Any) -> None:
        """Free the memory behind a faulted slice whose bytes nobody needs. The slice still counts as resident."""

    def adopt(self, vbar_slice: Any, other: VBAR, other_slice: Any, signature: Signature) -> Signature | None:
        """Let a slice that is not resident have what lies in another VBAR's slice under that signature.

        Return the new signature, with no pin; None, with nothing changed, where there is no room or nothing lies there
        any more. The other slice is given up.
        """

    def prioritize(self) -> None:
        """Rank above all other VBARs of the device. Faults may use the whole range again (up to the limit)."""

    def deprioritize(self) -> None:
        """Rank below all other VBARs of the device, to be evicted from first."""

    def set_limit(self, nbytes: int | None) -> None:
        """Set the most bytes that may be resident; None for no limit. Slices above are evicted, pinned ones later."""

    def free_memory(self, nbytes: int) -> int:
        """Evict from the top until `nbytes` are free. Return the bytes freed. Pinned slices stay."""

    def loaded_size(self) -> int:
        """Return the bytes that are resident now."""

    def within_reach(self) -> int:
        """Return the bytes that could be resident: resident now, free, or of VBARs that give way to this one."""

    def claim(self, nbytes: int, to_come: int = 0) -> None:
        """Evict VBARs of lower rank until `nbytes` are free, and `to_come` more bytes of this one fit under the cap.

        Where allocations are seen, nothing need be free.
        """

    def gave_way(self) -> int:
        """Return the bytes that were evicted since the last call because the computation ate into the headroom.

        0 where nobody can tell.
        """

    def peak_size(self) -> int:
        """Return the most bytes that were seen resident. comfy-aimdo is only asked between steps."""

    def resident(self, vbar_slice: Any) -> bool:
        """Say whether a slice is resident, without faulting it."""

    def close(self) -> None:
        """Give all memory and addresses back."""
