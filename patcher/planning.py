"""Plans what stays of one model's bundles, for the residency that runs it and for a forecast that only asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from heapq import nlargest

from ..ops.device.backend import Backend
from ..ops.gather import aligned
from ..ops.lending.bundle import Bundle
from .choose_caster import fixed_window
from .headroom import headroom_bytes, shown_headroom
from .layout import GAIN, Layout, Layouts
from .load_plan import SMALL_BYTES, LoadPlan, Window, by_bytes, plan_load
from .policy import Policy
from .remembered import Remembered
from .use_costs import UseCosts

# Bundles on their way to their pins at once, at their largest. They are as fast as what is brought.
WRITTEN_BACK = 3


@dataclass(frozen=True)
class Room:
    """Bytes beside the bundles that stay.

    whole: for all on their way. arena: of it, for transfers. rows: of tables. written_back: of it, for pins at most.
    """

    whole: int
    arena: int
    rows: int
    written_back: int


class Planning:
    """The arithmetic of a plan. What it asks of the device, those who plan say.

    addresses: the bundles that may reside, the lowest address first. placed_bytes: what the module's buffers take of
    the budget.
    """

    addresses: list[Bundle]

    def __init__(
        self, device: Backend, bundles: Sequence[Bundle], policy: Policy, remembered: Remembered, placed_bytes: int
    ) -> None:
        self.device, self.policy, self.remembered, self.placed_bytes = device, policy, remembered, placed_bytes
        self._all = bundles
        self.costs = UseCosts(device)
        self.addresses = []

    # -- what the device says

    @property
    def follows_free_memory(self) -> bool:
        """Say whether the weights give way by themselves when the computation allocates."""
        raise NotImplementedError

    @property
    def unit(self) -> int:
        """Give the bytes that come and go together."""
        raise NotImplementedError

    def reach(self) -> int:
        """Count the bytes that weights and buffers could hold together, were nothing kept free."""
        raise NotImplementedError

    def capped(self) -> int | None:
        """Count the bytes that the cap over all models leaves to this one; None for no cap."""
        raise NotImplementedError

    # -- what follows from it

    @property
    def window(self) -> Window:
        """Give the rule for how much may be on its way at once."""
        return fixed_window(self.policy, self.device) or by_bytes(self.remembered.window)

    @property
    def bundles(self) -> list[Bundle]:
        """List the bundles that may stay or be brought as a whole. A table by rows has no part in any plan."""
        return [bundle for bundle in self._all if not bundle.by_rows]

    @property
    def total_bytes(self) -> int:
        """Count the bytes of all bundles in their final form."""
        return sum(bundle.nbytes for bundle in self.bundles)

    @property
    def headroom(self) -> int:
        """Give the bytes to keep free on the device for the computation."""
        return headroom_bytes(self.policy, self.device)

    @property
    def expected(self) -> int:
        """Give the bytes that the computation is said to need. 0 where the VBAR sees that by itself."""
        return 0 if self.follows_free_memory or self.device.in_place else self.remembered.expected

    @property
    def kept_free(self) -> int:
        """Give the bytes that weights leave to the computation and to other programs."""
        shown = self.remembered.shown
        if shown is not None and not self.device.in_place:
            return shown_headroom(self.policy, self.device, shown) + self.remembered.learnt
        return max(self.headroom, self.expected) + self.remembered.learnt

    def budget(self) -> int | None:
        """Give the bytes that bundles may hold on the device now. None where only free memory limits them."""
        allowed = self.policy.vram_bytes
        return None if allowed is None else max(0, allowed - self.placed_bytes)

    def available(self) -> int:
        """Count the bytes that weights and their buffers may hold together."""
        budget, capped = self.budget(), self.capped()
        limits = [limit for limit in (budget, capped) if limit is not None]
        if budget is None or self.expected:
            limits.append(self.reach() - self.kept_free)
        return max(0, min(limits))

    def layouts(self) -> Layouts:
        """Give the address orders to choose from, for as long as nothing about the bundles changes."""
        # A thousand bundles in dozens of layouts. Counted anew in each, they would hold a step up for most of a second.
        costs = self.costs.counted_once()
        # A table may have become a bundle as any other since the order was noted.
        order = [b for b in dict.fromkeys([*self.remembered.order, *self.bundles]) if not b.by_rows]
        may_reside = [bundle for bundle in order if self.policy.may_reside(bundle.name)]
        plan = partial(self.plan_of, costs=costs)
        return Layouts(order, may_reside, plan, costs.use, fixed_window(self.policy, self.device))

    def plan_of(self, addresses: Sequence[Bundle], window: Window, costs: UseCosts | None = None) -> LoadPlan:
        """Plan what fits now in an address order, and with a window."""
        costs = costs or self.costs
        may = set(addresses)
        streamed = [bundle for bundle in self.bundles if bundle not in may]
        kinds = costs.buffer, costs.casts, costs.load
        return plan_load(addresses, self.available(), window, *kinds, streamed, self.unit)

    def timed_layout(self) -> tuple[Layout, bool]:
        """Give the layout for steps of the pace that was measured, and whether that is another than now."""
        layouts, pace = self.layouts(), self.remembered.pace
        assert pace is not None
        now = layouts.expected(self.addresses, self.remembered.window, pace)
        best = layouts.best(pace, now)
        return (best, True) if best.seconds * GAIN < now.seconds else (now, False)

    def room(self, plan: LoadPlan, stays: Sequence[Bundle]) -> Room:
        """Count what bundles on their way may take beside `stays`: what the weights leave."""
        resides = sum(aligned(bundle.nbytes) for bundle in self.addresses)
        # A budget of 0 asks for streaming, which is as fast as ever.
        is_streamed = self.budget() == 0
        whole = plan.reserve if is_streamed else self.available() - min(plan.limit, resides)
        stay = set(stays)
        offloaded = [bundle for bundle in self.bundles if bundle not in stay]
        # Without room for the rows of tables beside it, each look-up would end what is on its way.
        rows = self.costs.rows(self._all)
        made = nlargest(WRITTEN_BACK, [bundle.nbytes for bundle in offloaded if self._comes_back(bundle)])
        kept = 0
        if is_streamed and made and not self.device.in_place:
            # Nor would the next be made, in a first step, before what was made last lies in its pin, beside what a
            # module around the two holds of its own.
            around = (self.costs.use(bundle) for bundle in offloaded if bundle.nbytes < SMALL_BYTES)
            kept = made[0] + max(around, default=0)
        whole += rows + kept if is_streamed else 0
        arena = self.costs.arena(stays, offloaded, plan, self.window, max(0, whole - rows - kept))
        return Room(whole, arena, rows, sum(made))

    def _comes_back(self, bundle: Bundle) -> bool:
        """Say whether what is made of an offloaded bundle is yet to be sent to its pin."""
        return self.costs.keeps_final_form(bundle) and not bundle.pin_is_current

    def held(self, plan: LoadPlan, stays: Sequence[Bundle]) -> int:
        """Count what weights hold with those on their way: the arena, and beside it what is made or looked up.

        What was made is held until it lies in its pin, while the next is made. One bundle must pass in any case.
        """
        room, stay = self.room(plan, stays), set(stays)
        brought = [bundle for bundle in self.bundles if bundle not in stay]
        making = max([*map(self.costs.casts, brought), *map(self.costs.makes, stays)], default=0)
        beside = min(max(0, room.whole - room.arena), making + room.written_back + room.rows)
        one = max([*map(self.costs.use, brought), *map(self.costs.load, stays)], default=0)
        mapped = -(-sum(bundle.nbytes for bundle in stays) // self.unit) * self.unit
        return mapped + max(room.arena + beside, one)
