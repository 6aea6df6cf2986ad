"""Says how much device memory stays free for the computation."""

from __future__ import annotations

from ..ops.device.backend import Backend
from .policy import Policy

GIB = 1 << 30


def default_headroom(device: Backend) -> int:
    """Give the bytes to keep free where the policy says nothing: a twentieth of the device, between 0.5 and 2 GiB.

    More where the user reserves more for others.
    """
    _, total = device.memory()
    return max(min(max(total // 20, GIB // 2), 2 * GIB), device.reserved)


def headroom_bytes(policy: Policy, device: Backend) -> int:
    """Give the bytes to keep free on the device for the computation."""
    return default_headroom(device) if policy.headroom_bytes is None else policy.headroom_bytes
