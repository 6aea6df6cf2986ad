"""Decides which bundles of one model stay on the device. Holds their VBAR and the plan, and keeps both up to date.

A `Residency` exists only while its model is prepared, so all its fields are set. Pins and `Remembered` outlive it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from ..ops.device.backend import Backend
from ..ops.ledger import Ledger, in_words
from ..ops.lending.bundle import Bundle
from ..ops.lending.pins import Pins
from ..ops.vbar import cap
from ..ops.vbar.protocol import VBAR
from .choose_caster import choose_caster
from .choose_vbar import choose_vbar
from .headroom import GIB
from .layout import Held, evicted, execution_order
from .load_plan import LoadPlan, LoadState, budget_in_words, plan_unload
from .planning import Planning
from .policy import Policy
from .ram_pressure import is_short_of, room_for_staging
from .remembered import Remembered

# Kept free while weights come, where the computation's own need is known and planned for. By then it has taken a part.
FLOOR = GIB // 4
# Bundles that are gathered at once, at their largest: readers fill some while others leave. Fewer where RAM is short,
# as pins save more.
STAGED, STAGED_WHERE_SHORT = 8, 6


class Residency(Planning):
    """Lays the bundles out in a VBAR and plans against the policy's budget.

    placed_bytes: what the module's buffers take of the budget.
    Raises RuntimeError where the policy forces a VBAR that cannot be had, DeviceError where the device fails.
    """

    def __init__(
        self,
        device: Backend,
        bundles: Sequence[Bundle],
        policy: Policy,
        pins: Pins,
        ledger: Ledger,
        remembered: Remembered,
        may_init: bool,
        placed_bytes: int = 0,
    ) -> None:
        super().__init__(device, bundles, policy, remembered, placed_bytes)
        self.pins, self.ledger, self.may_init = pins, ledger, may_init
        self.resized = False  # whether a bundle's size no longer fits its addresses
        self._peak = 0
        self._coming = True  # bundles that are to stay
        self.caster = choose_caster(device, self._choose_vbar(), pins, ledger, policy, remembered)
        self.caster.per_step = len(self.bundles)
        self.caster.on_out_of_memory = self.learn_from_failure
        self.caster.watch = remembered.next_watch(device)
        try:
            self._lay_out()
            self._apply(self._new_plan())
        except BaseException:
            self.close()
            raise

    # -- the device

    @property
    def vbar(self) -> VBAR:
        return self.caster.vbar

    @property
    def follows_free_memory(self) -> bool:
        return self.vbar.follows_free_memory

    @property
    def unit(self) -> int:
        return self.vbar.unit

    def reach(self) -> int:
        return self.vbar.within_reach() + self.caster.buffer_bytes

    def capped(self) -> int | None:
        return cap.reach(self.vbar)

    # -- layout

    def _choose_vbar(self) -> VBAR:
        nbytes = 512 + sum(bundle.nbytes + 512 for bundle in self.bundles)  # 512: the alignment of each
        failure = self.remembered.aimdo_failure
        return choose_vbar(self.device, self.policy, self.headroom, nbytes, self.ledger, self.may_init, failure)

    def _keep_floor(self) -> None:
        is_known = self.expected or self.remembered.shown is not None
        self.vbar.headroom = min(self.headroom, FLOOR) if is_known else self.headroom

    def _lay_out(self, addresses: Sequence[Bundle] | None = None) -> None:
        """Allocate every bundle's addresses, the lowest for those that should stay."""
        self.resized = False
        self._placed = self.bundles
        self.addresses = list(addresses if addresses is not None else self._first_addresses())
        for bundle in self._all:
            bundle.move_to(None)
        for bundle in self.addresses:
            bundle.move_to(self.vbar.alloc(bundle.nbytes, partial(evicted, bundle, self.ledger)))

    def _first_addresses(self) -> Sequence[Bundle]:
        """Choose an address order where none is said: by the pace of earlier steps, or else by a guess at it."""
        self.addresses = self.layouts().guessed()
        if self.remembered.pace is None or self.plan_of(self.addresses, self.window).state is not LoadState.PARTIAL:
            return self.addresses
        layout, _ = self.timed_layout()
        self.remembered.window = layout.window
        self.remembered.note_choice(self.plan_of(layout.addresses, self.window).limit)
        return layout.addresses

    def _rebuild(self, addresses: Sequence[Bundle] | None = None) -> None:
        """Lay out a new VBAR, and move what stays resident. No bundle may be lent. addresses: None for the usual."""
        caster = self.caster
        with caster.lock:
            caster.settle_prefetch()
            self.note_peak()
            before, caster.vbar = caster.vbar, self._choose_vbar()  # which may raise: a new one may be refused
            kept = [Held.now(bundle) for bundle in self.addresses if bundle.views is not None]
            self._lay_out(addresses)
            self._apply(self._new_plan())
            stays = set(self.addresses[: self.plan.resident])
            for held in reversed(kept):
                if held.bundle in stays:
                    held.move(before, self.vbar)
            before.close()

    def rebuild_if_resized(self) -> None:
        """Give addresses to bundles whose size a patch has changed. Done when a step begins."""
        if (self.resized or self._placed != self.bundles) and not any(bundle.loan for bundle in self._all):
            self._rebuild()

    def _give_vbar_back(self) -> None:
        self.vbar.close()
        for bundle in self._all:
            bundle.left()

    # -- budget

    def _new_plan(self) -> LoadPlan:
        """Plan what fits now, and note which changes of the pins the plan knows of."""
        self._planned_for = self.pins.changes
        return self.plan_of(self._with_addresses(), self.window)

    def _with_addresses(self) -> list[Bundle]:
        """List what a rule lets stay, in address order."""
        return [bundle for bundle in self.addresses if bundle.vbar_slice is not None]

    def _apply(self, plan: LoadPlan) -> None:
        vbar, budget = self.vbar, self.budget()
        self.plan = plan
        self._keep_floor()
        vbar.set_limit(plan.limit)
        allowed = self.policy.vram_bytes
        reason = self._free_in_words() if allowed is None else f"budget {in_words(allowed)} set by the policy"
        if budget is not None and self.expected:
            reason += f", {self._free_in_words()}"
        reason += cap.in_words(self.device.device)
        if plan != self.remembered.plan:
            self.ledger.decide(plan.in_words(self.total_bytes, reason))
        self.remembered.plan = plan
        self._give_room(plan)
        largest = max((self.costs.use(bundle) for bundle in self.bundles), default=0)
        said = budget_in_words(allowed, largest + self.placed_bytes, plan.reserve)
        if said is not None:
            self.ledger.decide_once(said, level=logging.INFO)

    def _free_in_words(self) -> str:
        kept = "headroom" if self.kept_free == self.headroom else "for the computation"
        if self.remembered.shown is not None:
            kept = f"for the computation, which took {in_words(self.remembered.shown)} in an earlier run"
        return f"{self.device.free_in_words()}, {in_words(self.kept_free)} {kept}"

    def _give_room(self, plan: LoadPlan) -> None:
        """Let bundles on their way take what the weights leave."""
        stays = self._with_addresses()[: plan.resident]
        stay = set(stays)
        self._coming = any(bundle.views is None for bundle in stays)
        self._expect_pins([bundle for bundle in self.bundles if bundle not in stay])
        room = self.room(plan, stays)
        sizes = [bundle.source_bytes for bundle in self.bundles]
        count = STAGED_WHERE_SHORT if self.pins.outgrow_ram else STAGED
        staging = room_for_staging(sizes, count, self.caster.staging_bytes)
        self.caster.set_room(room.whole, room.arena, room.written_back, staging, max(sizes, default=0))

    def _expect_pins(self, offloaded: Sequence[Bundle]) -> None:
        """Tell the pins who will ask for one, and whether RAM has room for the file beside them."""
        brought = set(offloaded)
        self.pins.expect([bundle for bundle in self.remembered.order if bundle in brought])
        to_come = sum(bundle.nbytes for bundle in offloaded) - self.pins.used
        self.pins.outgrow_ram = is_short_of(to_come + sum(bundle.source_bytes for bundle in self.bundles))

    def _raise_limit(self) -> None:
        """Use memory that was set aside for computing patches that are now computed and pinned.

        The limit never shrinks here. Otherwise patches that change at every step would evict bundles that they do not
        touch.
        """
        plan = self._new_plan()
        if plan.limit > self.plan.limit:
            self._apply(plan)

    def _follow_free_memory(self) -> None:
        """Shrink the plan at once when what is to stay free is gone, grow it when clearly more is free."""
        allowed = self.available()
        used = min(self.plan.limit, self.total_bytes) + self.plan.reserve
        # What is free varies all the time. A cap does not.
        less, more = (0, self.vbar.unit) if cap.holds(self.device.device) else (GIB // 32, GIB // 4)
        grows = allowed > used + more and self.plan.resident < len(self._with_addresses())
        if allowed < used - less or grows:
            self._apply(self._new_plan())

    def _to_come(self) -> int:
        """Count the bytes that weights and buffers are yet to take."""
        buffers = self.plan.reserve - self.caster.buffer_bytes
        weights = min(self.plan.limit, self.total_bytes) - self.vbar.loaded_size()
        if self.device.in_place:  # what has yet to pass does not come now
            stays = self._with_addresses()[: self.plan.resident]
            weights -= sum(one.nbytes for one in stays if one.may_pass and not one.has_passed and one.views is None)
        return max(0, weights) + max(0, buffers)

    def _claim(self) -> None:
        """Let models of lower rank give way to what is yet to come, and to the computation."""
        to_come = self._to_come()
        self.vbar.claim(self.kept_free + to_come, to_come)

    def free_for_computation(self, free: int, expected: int) -> int:
        """Count the bytes that a computation may take. expected: what it was promised, for which weights give way."""
        return max(free - self._to_come(), min(expected, self.reach()))

    def begin_use(self, changed: bool) -> None:
        """Make room at once for the weights and the computation. changed: another one is expected than before."""
        self.rebuild_if_resized()
        if changed or self.expected or cap.holds(self.device.device):
            self._apply(self._new_plan())
        self._claim()
        self.caster.begin_use()

    def learn(self) -> None:
        """Leave more to a computation that has taken weights' memory, in this step or by running out of it.

        What others took is gone from what is free, so it is not counted twice.
        """
        gone = self.vbar.gave_way()
        if gone:
            kept = self.available() - self.vbar.loaded_size() - self.caster.buffer_bytes
            self.remembered.learnt += max(0, min(gone, kept))
            self.caster.begin_use()  # what weights held before is no part of the peak that comes

    def learn_from_failure(self) -> None:
        """Leave more to a computation that has run out of memory beside these weights."""
        if not self.vbar.follows_free_memory and not self.device.in_place and self.remembered.expected:
            self.remembered.learnt += self.kept_free // 4

    def set_policy(self, policy: Policy) -> None:
        """Follow another policy at once. Raises RuntimeError where it forces a VBAR that cannot be had."""
        before, self.policy = self.policy, policy
        self.caster.cancel_prefetch()  # prefetched bundles could not be evicted
        if policy.vbar != before.vbar:
            try:
                self._rebuild()
            except RuntimeError:
                self.policy = before
                raise

    def follow_policy(self) -> None:
        """Keep the policy's headroom and budget from now on."""
        self._apply(self._new_plan())

    # -- steps

    def begin_step(self) -> None:
        """Follow the step before: a VBAR that failed, bundles of another size, the order in which they ran."""
        self.note_peak()
        self.drop_buffers()
        failure = self.vbar.failure
        if failure is not None and not any(bundle.loan for bundle in self.bundles):
            self.remembered.aimdo_failure = failure
            self._rebuild()
        self.rebuild_if_resized()
        self.learn()
        lent = any(bundle.loan for bundle in self.bundles)  # a step may begin half way down the modules
        if not lent:
            is_other = not self.remembered.traced and self.ledger.counters.steps > 1 and self._follow_trace()
            if not self._follow_pace() and is_other:
                self.ledger.decide("the first step ran the bundles in another order than was guessed: laid out anew")
                self._rebuild()
        if self._coming:
            self._give_room(self.plan)  # what came to stay may have been cast, which takes no room any more

    def follow_budget(self) -> None:
        """Use a budget that has grown. Give way where free memory has shrunk and the VBAR does not see it."""
        if self.pins.changes != self._planned_for:
            self._raise_limit()
        elif self.budget() is None or self.expected or cap.holds(self.device.device):
            self._follow_free_memory()
        self._claim()

    def _follow_trace(self) -> bool:
        """Use the order in which the first step ran. Say whether what stays was chosen for another one."""
        guessed = [bundle for bundle in self.remembered.order if not bundle.by_rows]
        self.remembered.order = execution_order(self.caster.first, self.bundles)
        self.remembered.traced = True
        self.remembered.note_order(self.remembered.order)
        self.caster.follow_trace(self.bundles)
        other = self.remembered.order != guessed and self.remembered.pace is None
        return other and self.plan.state is LoadState.PARTIAL

    def _follow_pace(self) -> bool:
        """Choose the layout anew where the last step took another time than it was chosen for. Say whether it did."""
        caster, remembered = self.caster, self.remembered
        if caster.watch is not None and not caster.watch.has_marks:
            return False  # its step begins now
        timed = remembered.note_pace(caster.watch)
        caster.watch = remembered.next_watch(self.device)
        if not timed or self.plan.state is not LoadState.PARTIAL:
            return False
        if not remembered.is_other_step(self.plan.limit):
            return False
        remembered.note_choice(self.plan.limit)
        layout, is_other = self.timed_layout()
        if is_other:
            remembered.window = layout.window
            self._rebuild(layout.addresses)
        assert remembered.pace is not None
        self.ledger.decide(self.layouts().in_words(layout, remembered.pace))
        return True

    # -- memory

    def note_peak(self) -> None:
        """Remember the most bytes that were resident, before the VBAR goes or shrinks."""
        self._peak = max(self._peak, self.vbar.peak_size())
        self.caster.note_held()

    @property
    def peak_bytes(self) -> int:
        """Count the most bytes that were mapped since this residency began."""
        self.note_peak()
        return self._peak

    @property
    def peak_held(self) -> int:
        """Count the most bytes of device memory that weights, and bundles on their way, have held together."""
        return self.peak_bytes + self.caster.peak_buffer_bytes

    def drop_buffers(self) -> None:
        """Give the buffers back where all bundles have come to stay, or where they are RAM that nobody counts."""
        caster = self.caster
        if not caster.has_buffers:
            return
        stays = all(bundle.vbar_slice is not None for bundle in self.bundles)
        if self.device.in_place or (stays and self.vbar.loaded_size() >= self.total_bytes):
            caster.free_buffers()

    def is_resident(self, bundle: Bundle) -> bool:
        """Say whether the bundle's slice has memory now."""
        return bundle.vbar_slice is not None and self.vbar.resident(bundle.vbar_slice)

    def free(self, nbytes: int | None = None) -> int:
        """Evict until `nbytes` are free (None: all). Returns the bytes freed. Any thread may call it.

        Lent bundles stay.
        """
        with self.caster.lock, self.device.current():
            self.note_peak()
            if nbytes is None:
                return self.caster.free()
            freed = self.caster.free_buffers()
            if freed >= nbytes:
                return freed
            resident = [bundle for bundle in self.addresses if self.is_resident(bundle)]
            wanted = plan_unload(
                resident, nbytes - freed, self.plan.reserve, self.window, self.costs.buffer, self.costs.casts
            )
            return freed + self.vbar.free_memory(wanted)

    def close(self) -> None:
        """Give all memory of the device back. Raises DeviceError where it fails, after giving back all else."""
        with self.caster.lock, self.device.current():
            self.note_peak()
            try:
                self.caster.close()
            finally:
                self._give_vbar_back()
                for bundle in self._all:
                    bundle.drop_pages()
