"""What the nodes share: their category and the type of the policy's wire."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "spillway"
PolicyType = io.Custom("SPILLWAY_POLICY")


def policy_input() -> io.Input:
    """The optional policy that every loader takes."""
    return PolicyType.Input(
        "policy",
        optional=True,
        tooltip="From a Spillway Policy node: how much memory this model may take. Without one: whatever is free.",
    )
