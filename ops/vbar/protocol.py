"""The VBAR protocol: a reserved range of device addresses whose memory comes on demand and can be taken back.

A bundle is allocated an address range once. Before each use it is faulted: the answer is a signature, or None where
there is no room. While the signature stays the same, the data written under it is still there. After use: unpin. What
lies highest is evicted first, and an eviction lowers the watermark, above which faults fail until `prioritize`.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch

# Native VBAR calls from two threads on one device crash; the software VBAR shares its books between models.
lock = threading.RLock()

Signature = Any


class Slice(Protocol):
    """One allocation of a VBAR."""

    nbytes: int


class VBAR(Protocol):
    """What the caster needs; every implementation passes tests/vbar. All sizes in bytes.

    failure: why every fault is refused from now on, in the driver's words; None while all is well.
    """

    kind: str
    failure: str | None

    def alloc(self, nbytes: int) -> Any:
        """Reserve addresses, above all earlier allocations. Maps nothing."""

    def fault(self, piece: Any) -> Signature | None:
        """Ask for the memory of a slice and pin it; None, and no pin, where there is no room or no slice."""

    def same(self, signature: Signature, other: Signature | None) -> bool:
        """Whether nothing was evicted between two faults of one slice."""

    def unpin(self, piece: Any) -> None:
        """End one use of a faulted slice."""

    def tensor(self, piece: Any) -> torch.Tensor:
        """The memory of a faulted slice as 1-D uint8."""

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

    def peak_size(self) -> int:
        """The most bytes that were resident, as far as was looked: comfy-aimdo is only asked between steps."""

    def resident(self, piece: Any) -> bool:
        """Whether a slice is resident, without faulting it."""

    def close(self) -> None:
        """Give all memory and addresses back."""
