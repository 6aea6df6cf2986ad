"""The VBAR protocol: a reserved range of device addresses whose memory comes on demand and can be taken back.

A bundle is allocated an address range once. Before each use it is faulted: the answer is a signature, or None where
there is no room. While the signature stays the same, the data written under it is still there. After use: unpin. What
lies highest is evicted first, and an eviction lowers the watermark, above which faults fail until `prioritize`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

# Native VBAR calls from two threads on one device crash; the software VBARs of a device share a count of free memory.
lock = threading.RLock()

Signature = Any


class VBAR(Protocol):
    """What the caster needs; every implementation passes tests/vbar. All sizes in bytes.

    kind: its name in reports. failure: why every fault is refused from now on, in the driver's words; None while all is
    well. follows_free_memory: it gives way by itself when the computation allocates; where it does not, whoever has no
    budget looks at the free memory at each step and sets a limit. headroom: bytes to keep free for the computation.
    """

    kind: str
    failure: str | None
    follows_free_memory: bool
    headroom: int

    def alloc(self, nbytes: int, on_evict: Callable[[], None]) -> Any:
        """Reserve addresses, above all earlier allocations. Maps nothing. None where the range is full.

        on_evict: called when the slice's memory is taken back, by those that can tell.
        """

    def fault(self, vbar_slice: Any) -> Signature | None:
        """Ask for the memory of a slice and pin it; None, and no pin, where there is no room or no slice."""

    def same(self, signature: Signature, other: Signature | None) -> bool:
        """Whether nothing was evicted between two faults of one slice."""

    def unpin(self, vbar_slice: Any) -> None:
        """End one use of a faulted slice."""

    def tensor(self, vbar_slice: Any) -> torch.Tensor:
        """The memory of a faulted slice as 1-D uint8."""

    def drop_tensor(self, vbar_slice: Any) -> None:
        """Let go of the memory behind a faulted slice whose bytes nobody needs; it counts as resident all the same."""

    def prioritize(self) -> None:
        """Above all other VBARs of the device, and faults may use the whole range again (up to the limit)."""

    def deprioritize(self) -> None:
        """Below all other VBARs of the device: the first to be evicted from."""

    def set_limit(self, nbytes: int | None) -> None:
        """The most that may be resident; None for none. What lies above is evicted, pinned slices later."""

    def free_memory(self, nbytes: int) -> int:
        """Evict from the top until that much is free; returns the bytes freed. Pinned slices stay."""

    def loaded_size(self) -> int:
        """Bytes that are resident now."""

    def within_reach(self) -> int:
        """Bytes that could be resident: what is, what is free beside the headroom, and what gives way to this VBAR."""

    def peak_size(self) -> int:
        """The most bytes that were resident, as far as was looked: comfy-aimdo is only asked between steps."""

    def resident(self, vbar_slice: Any) -> bool:
        """Whether a slice is resident, without faulting it."""

    def close(self) -> None:
        """Give all memory and addresses back."""
