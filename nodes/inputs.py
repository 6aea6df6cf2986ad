"""The category of all nodes, and inputs that several of them take: policies and amounts of memory."""

from __future__ import annotations

from typing import NamedTuple

from comfy_api.latest import io

CATEGORY = "spillway"
PolicyType = io.Custom("SPILLWAY_POLICY")
# The value of an amount that is left to Spillway.
AUTO = -1.0
LoraType = io.Custom("SPILLWAY_LORA")


class ChosenLora(NamedTuple):
    """A file in models/loras, and its strengths."""

    name: str
    strength_model: float
    strength_clip: float


class OpenChoice(io.Combo.Input):
    """A choice of files or devices, of which the list may be older than they are. The node says that one is missing."""


def policy_input() -> io.Input:
    """Make the optional policy input that every loader has."""
    return PolicyType.Input(
        "policy",
        optional=True,
        tooltip="From a Spillway Policy node. Says how much memory this model may take. Without one it takes what is "
        "free.",
    )


def gigabytes_input(name: str, tooltip: str, step: float = 0.1, optional: bool = False) -> io.Input:
    """Make an input for an amount of memory in GB. It begins as AUTO."""
    return io.Float.Input(name, default=AUTO, min=AUTO, max=1024.0, step=step, tooltip=tooltip, optional=optional)


def given(node: str, name: str, gigabytes: float) -> float | None:
    """Return the amount given for a node's input, None for AUTO. Raises ValueError for what is no amount."""
    if gigabytes == AUTO:
        return None
    if not 0 <= gigabytes < float("inf"):
        raise ValueError(f"{node}: {name} is {gigabytes}; give 0 or more GB, or -1 to leave it to Spillway.")
    return gigabytes
