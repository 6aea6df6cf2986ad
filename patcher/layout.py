"""Chooses where bundles lie and how much may be on its way, so that a step is shortest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.gather import aligned, interpret_gathered_like
from ..ops.ledger import Ledger, in_words
from ..ops.lending.bundle import Bundle
from ..ops.vbar.protocol import VBAR
from .layer_names import VECTOR, has_part
from .load_plan import SMALL_BYTES, Cost, LoadPlan, Window, by_bytes, interleave
from .step_time import Pace, spread_over_time, step_seconds

# Parts of a step in which transfers and computing are balanced.
PARTS = (8, 32, 128)
# Bundles, at their largest, that room is kept for while they are on their way.
WINDOWS = (2, 3, 4, 6, 8)
# A wait of this share of the computation is not worth a word.
SHORT = 0.01
# A layout must be better by this to be worth moving what is there, which must pay within so many steps.
GAIN = 1.02
PAYS_WITHIN = 8


@dataclass(frozen=True)
class Layout:
    """addresses: the bundles that may reside, the lowest address first. window: see WINDOWS, if the policy sets none.

    seconds: of a step, as it is expected to be.
    """

    addresses: Sequence[Bundle]
    window: int
    seconds: float


# Plans a budget for bundles in an address order.
Planner = Callable[[Sequence[Bundle], Window], LoadPlan]


class Layouts:
    """order: of execution. may_reside: those of them that may. fixed: the policy's own window, if it has one."""

    def __init__(
        self,
        order: Sequence[Bundle],
        may_reside: Sequence[Bundle],
        plan: Planner,
        cost: Cost,
        fixed: Window | None,
    ) -> None:
        self.order, self.may_reside, self.plan, self.cost, self.fixed = order, may_reside, plan, cost, fixed

    def plain(self) -> list[Bundle]:
        """Return the address order that is even in bytes."""
        return interleave(self.may_reside, self.cost)

    def guessed(self) -> list[Bundle]:
        """Return an address order for a step that nobody has timed: computing takes as long as its weights are large.

        But for modulation, which multiplies one vector, and is waited for as its weights are large.
        """
        seconds = {b: 0.0 if has_part(b.name, VECTOR) else float(b.nbytes) for b in self.order}
        if all(seconds.values()):
            return self.plain()
        return spread_over_time(self.may_reside, self.cost, Pace(seconds, 1.0), PARTS[0], SMALL_BYTES)

    def expected(self, addresses: Sequence[Bundle], window: int, pace: Pace) -> Layout:
        """Return a layout with the seconds that a step is expected to take."""
        count = self._resident(addresses, window)
        return Layout(addresses, window, self._seconds(addresses, window, count, pace))

    def _seconds(self, addresses: Sequence[Bundle], window: int, count: int, pace: Pace) -> float:
        """Return the seconds of a step in which the first `count` bundles are resident."""
        stays = set(addresses[:count])
        on_its_way = [bundle.transfer_bytes for bundle in self.order if bundle not in stays]
        return step_seconds(self.order, stays, self._rule(window)(on_its_way), pace)

    def _rule(self, window: int) -> Window:
        return self.fixed or by_bytes(window)

    def _resident(self, addresses: Sequence[Bundle], window: int) -> int:
        """Count the bundles that stay resident in that layout."""
        return self.plan(addresses, self._rule(window)).resident

    def missing_bytes(self, layout: Layout, pace: Pace) -> int:
        """Return how many more bytes of the device would hide the transfers behind the computation."""
        addresses, enough = layout.addresses, (1 + SHORT) * sum(map(pace.compute, self.order))
        now = self._resident(addresses, layout.window)
        hidden = bisect_left(
            range(now, len(addresses)),
            True,
            key=lambda count: self._seconds(addresses, layout.window, count, pace) <= enough,
        )
        return sum(aligned(bundle.nbytes) for bundle in addresses[now : now + hidden])

    def best(self, pace: Pace, now: Layout | None = None) -> Layout:
        """Return the layout with the shortest step. Among equals the one with the smallest window comes first.

        now: the one that bundles lie in. What stays in it and not in another has to be brought in the next step, and
        that counts.
        """
        stays = self._stays(now) if now is not None else frozenset()

        def cost(layout: Layout) -> float:
            left = sum(bundle.transfer_bytes for bundle in stays - self._stays(layout))
            return layout.seconds + pace.transfer(left) / PAYS_WITHIN

        return min(self._candidates(pace, now), key=cost)

    def _stays(self, layout: Layout) -> frozenset[Bundle]:
        return frozenset(layout.addresses[: self._resident(layout.addresses, layout.window)])

    def in_words(self, layout: Layout, pace: Pace) -> str:
        """Say how long a step waits for the bus, as a line of the ledger."""
        computing = sum(map(pace.compute, self.order))
        waits = max(0.0, layout.seconds - computing)
        said = f"a step is expected to take {layout.seconds:.2f} s, of which it computes {computing:.2f} s"
        if waits < SHORT * computing:
            return f"{said}: what is offloaded comes behind it"
        more = in_words(self.missing_bytes(layout, pace))
        return f"{said} and waits {waits:.2f} s for the bus, at {pace.bus / 1e9:.1f} GB/s; {more} more would hide it"

    def _candidates(self, pace: Pace, now: Layout | None) -> Iterator[Layout]:
        orders = [self.plain()] if now is None else [now.addresses, self.plain()]
        orders += [spread_over_time(self.may_reside, self.cost, pace, parts, SMALL_BYTES) for parts in PARTS]
        for window in WINDOWS[: 1 if self.fixed is not None else None]:
            for addresses in orders:
                yield self.expected(addresses, window, pace)


@dataclass(frozen=True)
class Held:
    """What a bundle holds in a VBAR that is about to be given back."""

    bundle: Bundle
    vbar_slice: Any
    signature: Any
    views: Sequence[torch.Tensor] | None

    @staticmethod
    def now(bundle: Bundle) -> Held:
        return Held(bundle, bundle.vbar_slice, bundle.signature, bundle.views)

    def move(self, before: VBAR, after: VBAR) -> None:
        """Move it to where the bundle lies now. Where that has no room, the bundle is brought again when it is used."""
        bundle = self.bundle
        if bundle.vbar_slice is None:
            return
        signature = after.adopt(bundle.vbar_slice, before, self.vbar_slice, self.signature)
        if signature is not None and self.views is not None and bundle.lies(self.views):
            bundle.became_resident(signature, self.views)  # where it lies in its file
        elif signature is not None:
            memory = after.tensor(bundle.vbar_slice)[: bundle.nbytes]
            bundle.became_resident(signature, interpret_gathered_like(bundle.final, memory))  # type: ignore[arg-type]


def execution_order(first: Bundle | None, bundles: Sequence[Bundle]) -> list[Bundle]:
    """List the bundles in the order of the last step, which began with `first`. Those that did not run come last."""
    order: dict[Bundle, None] = {}
    bundle = first
    while bundle is not None and bundle not in order:
        order[bundle] = None
        bundle = bundle.successor
    return list(order) + [bundle for bundle in bundles if bundle not in order]


def evicted(bundle: Bundle, ledger: Ledger) -> None:
    """Take note that the VBAR has taken the memory of a bundle back."""
    ledger.counters.evictions += 1
    bundle.evicted()
