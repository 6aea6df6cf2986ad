"""Pins give way when the machine runs short of RAM: those of the model that was used longest ago first."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import psutil

from ..ops.ledger import in_words

if TYPE_CHECKING:
    from .dynamic import DynamicModel

GIB = 1 << 30


def available_ram() -> int:
    """Bytes that the system could give to somebody now."""
    return int(psutil.virtual_memory().available)


@functools.cache
def ram_reserve() -> int:
    """Bytes that pins leave to everybody else: a sixteenth of the machine, between 0.5 and 2 GiB."""
    return min(max(int(psutil.virtual_memory().total) // 16, GIB // 2), 2 * GIB)


def ease(models: Iterable[DynamicModel]) -> int:
    """Let pins go where less than the reserve is available; returns the bytes freed. Cheap: called at every step."""
    held = [model for model in list(models) if model.pinned_bytes]
    if not held:
        return 0
    short = ram_reserve() - available_ram()
    return free_ram(held, short, "RAM runs short") if short > 0 else 0


def free_ram(models: Iterable[DynamicModel], nbytes: int, reason: str) -> int:
    """Free that many bytes of pins: by rank, then by last use. Models that are always kept keep theirs.

    The budgets shrink with the pins, or the next step would take the memory again. Returns the bytes freed.
    """
    freed = 0
    for model in sorted(models, key=lambda model: (model.rank, model.last_used)):
        if freed >= nbytes:
            break
        if model.policy.keep == "always" or model.pins is None or not model.pins.held:
            continue
        # Not waiting: two models that step at once would wait for each other.
        given = model.free_pins(nbytes - freed, wait=False)
        if not given:
            continue
        model.pins.budget = model.pins.held
        model.ledger.decide(f"gave {in_words(given)} of pins back: {reason}")
        freed += given
    return freed
