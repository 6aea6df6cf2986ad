"""Making room in RAM before a model is loaded."""

from __future__ import annotations

from . import dynamic_model as dynamic
from . import ram_pressure


def free_ram(nbytes: int, keep: dynamic.DynamicModel | None = None) -> int:
    """Let the pins of other models go until `nbytes` of RAM are available; returns the bytes freed.

    Callers ask for twice a model's size: its pages in the cache, and its pins.
    """
    short = nbytes - ram_pressure.available_ram()
    if short <= 0:
        return 0
    others = [model for model in list(dynamic.models) if model is not keep]
    return ram_pressure.free_ram(others, short, "another model needs RAM")
