"""Says how much device memory stays free for the computation."""

from __future__ import annotations

from ..ops.device.backend import Backend
from .policy import Policy

GIB = 1 << 30
# Beside what a computation took: allocators leave gaps, and other programs take a little more or less.
SPARE, PART = GIB // 4, 8
# What was measured varies a little from run to run. The plan must not.
ROUND = 64 << 20


def default_headroom(device: Backend) -> int:
    """Give the bytes to keep free where the policy says nothing: a twentieth of the device, between 0.5 and 2 GiB.

    More where the user reserves more for others.
    """
    _, total = device.memory()
    return max(min(max(total // 20, GIB // 2), 2 * GIB), device.reserved)


def headroom_bytes(policy: Policy, device: Backend) -> int:
    """Give the bytes to keep free on the device for the computation."""
    return default_headroom(device) if policy.headroom_bytes is None else policy.headroom_bytes


def shown_headroom(policy: Policy, device: Backend, shown: int) -> int:
    """Give the bytes to keep free for a computation that took `shown` in an earlier run, and for others."""
    wanted = shown + max(shown // PART, SPARE) + device.reserved
    return max(-(-wanted // ROUND) * ROUND, policy.headroom_bytes or 0)
