"""What the nodes share: their category, the policy that loaders take, and amounts of memory in gigabytes."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "spillway"
PolicyType = io.Custom("SPILLWAY_POLICY")
# Leaves an amount to Spillway.
AUTO = -1.0


def policy_input() -> io.Input:
    """The optional policy that every loader takes."""
    return PolicyType.Input(
        "policy",
        optional=True,
        tooltip="From a Spillway Policy node: how much memory this model may take. Without one: whatever is free.",
    )


def gigabytes_input(name: str, tooltip: str, step: float = 0.1) -> io.Input:
    return io.Float.Input(name, default=AUTO, min=AUTO, max=1024.0, step=step, tooltip=tooltip)


def given(node: str, name: str, gigabytes: float) -> float | None:
    """What was given for an input of a node; None for AUTO. Raises ValueError for what is no amount."""
    if gigabytes == AUTO:
        return None
    if not 0 <= gigabytes < float("inf"):
        raise ValueError(f"{node}: {name} is {gigabytes}; give 0 or more GB, or -1 to leave it to Spillway.")
    return gigabytes
