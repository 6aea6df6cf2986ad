"""Makes pins give way when the machine runs short of RAM. The model that was used longest ago goes first."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from heapq import nlargest
from typing import Protocol

from ..ops.ledger import Ledger, in_words
from ..ops.lending.pins import Pins
from ..ops.ram import available
from .policy import Policy

GIB = 1 << 30
# Reading the available RAM takes up to a millisecond where there are cgroups.
POLL_SECONDS = 0.05
# Others who say how many bytes pins may still take.
pin_limits: list[Callable[[], int]] = []
_looked = -POLL_SECONDS  # time.monotonic() of the last look


class PinHolder(Protocol):
    """Holds pins, as a model does. rank: the lowest gives way first. last_used: time.monotonic() of the last step."""

    pins: Pins | None
    policy: Policy
    ledger: Ledger
    last_used: float

    @property
    def rank(self) -> float: ...

    @property
    def pinned_bytes(self) -> int: ...

    def free_pins(self, nbytes: float, wait: bool) -> int: ...


def available_ram() -> int:
    """Count the bytes of RAM that this process can have now, the least of what machine and container allow."""
    return available.available_ram().available


@functools.cache
def ram_reserve() -> int:
    """Count the bytes that pins leave to everybody else here."""
    return ram_reserve_of(available.total_ram())


def ram_reserve_of(total: int) -> int:
    """Count the bytes that pins leave to everybody else of `total` bytes: a sixteenth, between 0.5 and 2 GiB."""
    return min(max(total // 16, GIB // 2), 2 * GIB)


def relieve(models: Iterable[PinHolder]) -> int:
    """Free pins where less than the reserve is available. Returns the bytes freed.

    Called at every step, and looks at most once in POLL_SECONDS.
    """
    global _looked
    now = time.monotonic()
    if now - _looked < POLL_SECONDS:
        return 0
    held = [model for model in list(models) if model.pinned_bytes]
    if not held:
        return 0
    _looked = now
    short = ram_reserve() - available_ram()
    return _free_pins(held, short, f"RAM runs short{_limit()}") if short > 0 else 0


def free_ram(models: Iterable[PinHolder], nbytes: int) -> int:
    """Free the models' pins until `nbytes` of RAM are available. Returns the bytes freed.

    Makes room for a model that is about to be loaded: for its pins, which take the place of its pages in the cache.
    """
    short = nbytes - available_ram()
    return _free_pins(models, short, f"another model needs RAM{_limit()}") if short > 0 else 0


def give_pins(models: Iterable[PinHolder], nbytes: int) -> int:
    """Free `nbytes` of pins for an allocation that the system has refused. Returns the bytes freed."""
    return _free_pins(models, nbytes, "memory was refused")


def room_for_pins() -> int:
    """Count the bytes that pins may take now. A budget was a share of what was free when it was set."""
    return _left_to_pins(available.recent_ram().available)


def _left_to_pins(free: int) -> int:
    return max(0, min([free - ram_reserve(), *(limit() for limit in pin_limits)]))


def pin_budget(policy: Policy, wanted: int, held: int, in_place: bool) -> int:
    """Count the bytes that a model's pins may take. wanted: bytes of all that may be pinned. held: taken by now.

    in_place: pins hold only patched weights for which the budget has no room, and which would be computed at each use.
    """
    if policy.pinned_bytes is not None:
        return policy.pinned_bytes
    if in_place:
        return min(wanted, available_ram() // 2)
    # A pin takes the place of the file's pages, so it may have all that is left to pins. Blocks have gaps.
    return min(wanted + wanted // 16, held + _left_to_pins(available_ram()))


def is_short_of(nbytes: int) -> bool:
    """Say whether the system has not `nbytes` of RAM for us beside what it leaves to others."""
    return available.recent_ram().available - ram_reserve() < nbytes


def room_for_staging(sizes: Iterable[int], count: int, held: int) -> int:
    """Count the bytes that bundles on their way may be gathered in. One of them must pass, however short RAM is.

    sizes: of the bundles. count: how many may be on their way. held: what their buffers take by now.
    """
    buffers = nlargest(count, sizes)
    return max(sum(buffers[:1]), min(sum(buffers), room_for_pins() + held))


def _limit() -> str:
    ram = available.recent_ram()
    return "" if ram.of_machine else f" ({ram.reason})"


def _free_pins(models: Iterable[PinHolder], nbytes: int, reason: str) -> int:
    """Free `nbytes` of pins, by rank and then by last use. Models that are always kept keep theirs.

    The budgets shrink with the pins. Otherwise the next step would take the memory again. Returns the bytes freed.
    """
    freed = 0
    for model in sorted(models, key=lambda model: (model.rank, model.last_used)):
        if freed >= nbytes:
            break
        if model.policy.keep == "always" or model.pins is None or not model.pins.held:
            continue
        # Do not wait for the caster's lock. Two models that step at once would wait for each other for ever.
        given = model.free_pins(nbytes - freed, wait=False)
        if not given:
            continue
        model.pins.budget = model.pins.held
        model.ledger.decide(f"gave {in_words(given)} of pins back: {reason}")
        freed += given
    return freed
