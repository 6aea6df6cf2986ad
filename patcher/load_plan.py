"""Plans how much of a model stays on the device, and in which address order its bundles lie."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from heapq import heappop, heappush, nlargest
from itertools import accumulate

from ..ops.gather import aligned
from ..ops.ledger import in_words
from ..ops.lending.bundle import Bundle

# Below this a bundle costs more to move than to keep.
SMALL_BYTES = 16 << 10

Cost = Callable[[Bundle], int]


class LoadState(Enum):
    """Says how much of a model can be resident."""

    NONE = "none"
    PARTIAL = "partial"
    FULL = "full"


@dataclass(frozen=True)
class LoadPlan:
    """Says what stays resident.

    limit: bytes that may be resident. reserve: bytes of temporary memory that offloading needs beside them.
    """

    state: LoadState
    limit: int
    reserve: int
    resident: int  # bundles
    offloaded: int
    offloaded_bytes: int

    def in_words(self, total: int, reason: str) -> str:
        """Write the plan as a line of the ledger. total: bytes of all bundles. reason: what limits them."""
        count = self.resident + self.offloaded
        if self.state is LoadState.FULL:
            return f"all {count} bundles may stay resident ({in_words(total)}): {reason}"
        return (
            f"offloaded {self.offloaded} of {count} bundles ({in_words(self.offloaded_bytes)}): {reason}, "
            f"{in_words(self.reserve)} reserved for transfers"
        )


def budget_in_words(budget: int | None, largest: int, reserve: int) -> str | None:
    """Say what a very small budget means; None for any other.

    largest: bytes that one use of a bundle takes, and the model's buffers beside it.
    """
    if budget == 0:
        return f"the budget is 0: nothing stays resident, and bundles on their way take {in_words(reserve)}."
    if budget is None or largest <= budget:
        return None
    return (
        f"the budget of {in_words(budget)} is smaller than the {in_words(largest)} that the largest bundle needs while "
        "it is used, with the model's buffers: nothing stays resident, and the peak is these."
    )


def _free(_: Bundle) -> int:
    return 0


# Given the bytes of each transfer, says how many of them may be on their way together.
Window = Callable[[Sequence[int]], int]


def bundles_ahead(count: int) -> Window:
    """Make room for the bundle in use and `count` others, at their largest."""
    return lambda sizes: sum(nlargest(1 + count, sizes))


def by_bytes(most: int) -> Window:
    """Make room for as many bytes as the `most` largest bundles have, whichever they are that lie there."""
    return lambda sizes: sum(nlargest(most, map(aligned, sizes)))


def _buffer(offloaded: Sequence[Bundle], window: Window, cost: Cost, casting: Cost = _free) -> int:
    """Sum the temporary bytes that offloading needs: those on their way, and what casting the one in use takes."""
    return window([cost(bundle) for bundle in offloaded]) + max(map(casting, offloaded), default=0)


def plan_load(
    order: Sequence[Bundle],
    budget: int,
    window: Window,
    cost: Cost,
    casting: Cost = _free,
    loading: Cost = _free,
    streamed: Sequence[Bundle] = (),
    unit: int = 1,
) -> LoadPlan:
    """Plan which bundles, in address order, stay resident within `budget` bytes beside the buffers of the others.

    window: see `Window`. casting: bytes that casting and patching one costs beside its buffer. loading: temporary bytes
    that making a bundle resident costs. streamed: bundles that never reside. unit: bytes that come and go together.
    """
    most = max(map(loading, order), default=0)
    reserve = max(most, _buffer(streamed, window, cost, casting))
    while True:
        limit = max(0, budget - reserve) // unit * unit
        used = count = 0
        for bundle in order:
            used += aligned(bundle.nbytes)
            if used > limit:
                break
            count += 1
        offloaded = [*order[count:], *streamed]
        needed = max(most if count else 0, _buffer(offloaded, window, cost, casting))
        if needed <= reserve:
            break
        reserve = needed
    state = LoadState.FULL if not offloaded else LoadState.PARTIAL if count else LoadState.NONE
    return LoadPlan(state, limit, reserve, count, len(offloaded), sum(bundle.nbytes for bundle in offloaded))


def plan_unload(
    resident: Sequence[Bundle], nbytes: int, reserve: int, window: Window, cost: Cost, casting: Cost = _free
) -> int:
    """Count the bytes to evict so that `nbytes` more are free. Sums from the high end of the address order.

    resident: the resident bundles, in address order. The highest goes first, and its buffers count against it.
    """
    freed = 0
    for index in range(len(resident) - 1, -1, -1):
        grown = max(0, _buffer(resident[index + 1 :], window, cost, casting) - reserve)
        if freed - grown >= nbytes:
            break
        freed += resident[index].nbytes
    return freed


def interleave(order: Sequence[Bundle], cost: Cost) -> list[Bundle]:
    """Order bundles that run in `order` by address, so that any prefix is spread evenly over the execution.

    Small bundles lie lowest, so they are resident whenever anything is. Of the others the first to run lies lowest.
    Each next bundle is the middle, by offload cost, of the longest stretch that is left. So every transfer has resident
    neighbours to hide behind, however much of the order is resident.
    """
    small = [bundle for bundle in order if bundle.nbytes < SMALL_BYTES]
    large = [bundle for bundle in order if bundle.nbytes >= SMALL_BYTES]
    ends = list(accumulate((max(1, cost(bundle), bundle.nbytes) for bundle in large), initial=0))
    addresses = large[:1]
    stretches = [(ends[1] - ends[-1], 1, len(large))] if len(large) > 1 else []  # minus the cost, from, to
    while stretches:
        _, first, last = heappop(stretches)
        middle = bisect_right(ends, (ends[first] + ends[last]) / 2, first, last) - 1
        addresses.append(large[middle])
        for start, end in ((first, middle), (middle + 1, last)):
            if start < end:
                heappush(stretches, (ends[start] - ends[end], start, end))
    return small + addresses
