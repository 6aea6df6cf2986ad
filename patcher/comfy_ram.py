"""Making room in RAM before a model is loaded."""

from __future__ import annotations

import psutil

from ..ops.ledger import in_words
from . import dynamic


def free_ram(nbytes: int, keep: dynamic.DynamicModel | None = None) -> int:
    """Let the pins of other models go until `nbytes` of RAM are available; returns the bytes freed.

    Callers ask for twice a model's size: its pages in the cache, and its pins.
    """
    short = nbytes - psutil.virtual_memory().available
    freed = 0
    for model in sorted(dynamic.models, key=lambda model: model.policy.priority):
        if short - freed <= 0:
            break
        if model is keep or model.policy.keep == "always" or not model.pinned_bytes:
            continue
        given = model.free_pins(short - freed)
        model.ledger.decide(f"gave {in_words(given)} of pins back: another model needs RAM")
        freed += given
    return freed
