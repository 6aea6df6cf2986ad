"""Amounts of memory as nodes take them: in gigabytes, and -1 where the choice is left to Spillway."""

from __future__ import annotations

from comfy_api.latest import io

AUTO = -1.0


def gigabytes_input(name: str, tooltip: str, step: float = 0.1) -> io.Input:
    return io.Float.Input(name, default=AUTO, min=AUTO, max=1024.0, step=step, tooltip=tooltip)


def given(node: str, name: str, gigabytes: float) -> float | None:
    """What was given for an input of a node; None for AUTO. Raises ValueError for what is no amount."""
    if gigabytes == AUTO:
        return None
    if not 0 <= gigabytes < float("inf"):
        raise ValueError(f"{node}: {name} is {gigabytes}; give 0 or more GB, or -1 to leave it to Spillway.")
    return gigabytes
