"""Simulates a step, to choose what stays on the device: the set for which the step is shortest.

A step cannot be shorter than its computation, nor than its transfers. It is longer than both where one waits for the
other: a stretch of layers that wait for the bus is followed by one that computes while the bus idles, and no more than
a window of bytes can be on its way between them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import accumulate

from ..ops.gather import aligned
from ..ops.lending.bundle import Bundle

CYCLES = 2  # the first one begins with nothing on its way


@dataclass(frozen=True)
class Pace:
    """What a step's time is made of. seconds: of computing with each bundle. bus: bytes a second of a transfer."""

    seconds: Mapping[Bundle, float]
    bus: float

    def compute(self, bundle: Bundle) -> float:
        return self.seconds.get(bundle, 0.0)

    def transfer(self, nbytes: int) -> float:
        return nbytes / self.bus


def step_seconds(order: Sequence[Bundle], resident: Collection[Bundle], window: int, pace: Pace) -> float:
    """Return the seconds of a step, in a row of like ones. order: of execution. window: bytes on their way at most."""
    bus = main = last = 0.0
    under_way: deque[tuple[int, float]] = deque()
    held = 0
    for _ in range(CYCLES):
        last = main
        for bundle in order:
            if bundle not in resident:
                nbytes = bundle.transfer_bytes
                size = aligned(nbytes)
                while under_way and held + size > window:
                    gone, end = under_way.popleft()
                    held -= gone
                    bus = max(bus, end)
                bus += pace.transfer(nbytes)
                main = max(main, bus) + pace.compute(bundle)
                under_way.append((size, main))
                held += size
            else:
                main += pace.compute(bundle)
    return main - last


def spread_over_time(
    order: Sequence[Bundle], cost: Callable[[Bundle], int], pace: Pace, parts: int, small: int
) -> list[Bundle]:
    """Order bundles by address so that, whatever prefix stays, the others' transfers are spread like the computing.

    The step is cut into `parts` of equal computing time. The next bundle to lie lowest is one of the part that has most
    to bring. Bundles below `small` bytes lie lowest of all.
    """
    little = [bundle for bundle in order if bundle.nbytes < small]
    large = [bundle for bundle in order if bundle.nbytes >= small]
    ends = list(accumulate((pace.compute(bundle) for bundle in large), initial=0.0))
    total = ends[-1] or 1.0
    members: list[list[Bundle]] = [[] for _ in range(parts)]
    for bundle, start, end in zip(large, ends, ends[1:], strict=False):
        members[min(parts - 1, int((start + end) / 2 / total * parts))].append(bundle)
    for part in members:
        part.sort(key=lambda bundle: (pace.compute(bundle) / max(1, bundle.nbytes), -bundle.nbytes), reverse=True)
    # Equal parts take turns that are spread, too.
    heap = [(-sum(max(1, cost(b)) for b in part), _scattered(i, parts), i) for i, part in enumerate(members) if part]
    heapify(heap)
    addresses = little
    while heap and heap[0][0] != 0:
        left, place, index = heap[0]
        bundle = members[index].pop()
        addresses.append(bundle)
        heapreplace(heap, (left + max(1, cost(bundle)) if members[index] else 0, place, index))
    return addresses


def _scattered(index: int, count: int) -> int:
    """Return the index with its bits in reverse, so that neighbours are far apart."""
    bits = max(1, (count - 1).bit_length())
    return int(format(index, f"0{bits}b")[::-1], 2)
