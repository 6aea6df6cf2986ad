"""Counts what a bundle that is brought, or that comes to stay, takes beside its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from ..ops.device.backend import Backend
from ..ops.gather import aligned
from ..ops.lending.bundle import Bundle
from .load_plan import LoadPlan, LoadState, Window

ROWS_BYTES = 16 << 20


@dataclass(frozen=True)
class UseCosts:
    """Bytes of temporary memory on one device."""

    device: Backend

    def counted_once(self) -> UseCosts:
        """Return costs that are counted once for each bundle, for as long as nothing about the bundles changes."""
        fixed = replace(self)
        for name in ("use", "buffer", "load"):
            object.__setattr__(fixed, name, cache(getattr(self, name)))
        return fixed

    def use(self, bundle: Bundle) -> int:
        """Count what one use of an offloaded bundle takes."""
        if not self.device.in_place:
            return bundle.offload_cost()
        return 0 if bundle.in_place or bundle.pin_is_current else bundle.offload_cost() - bundle.source_bytes

    def buffer(self, bundle: Bundle) -> int:
        """Count the buffer that an offloaded bundle arrives in."""
        return self.use(bundle) if self.device.in_place else bundle.transfer_bytes

    def brought(self, bundle: Bundle) -> int:
        """Count what the ledger counts when an offloaded bundle is brought."""
        return bundle.source_bytes if self.device.in_place else bundle.transfer_bytes

    def keeps_final_form(self, bundle: Bundle) -> bool:
        """Say whether a pin is to hold what was made of an offloaded bundle."""
        if bundle.offload_to == "disk":
            return False
        if self.device.in_place:
            return not bundle.in_place and (bundle.worth_keeping or bundle.offload_to in ("ram", "pin"))
        return bundle.worth_writing_back

    def casts(self, bundle: Bundle) -> int:
        """Count what casting and patching an offloaded bundle takes beside its buffer."""
        return self.use(bundle) - self.buffer(bundle)

    def load(self, bundle: Bundle) -> int:
        """Count what making a bundle resident takes."""
        return 0 if self.device.in_place else bundle.load_cost()

    def load_casts(self, bundle: Bundle) -> int:
        """Count the same beside the buffer, or the slice, that its source arrives in."""
        if self.device.in_place or bundle.source_is_final or bundle.pin_is_current:
            return 0
        return bundle.making_cost(resident=True)

    def makes(self, bundle: Bundle) -> int:
        """Count what a bundle that stays takes beside its buffer, when it comes and when an op uses it."""
        return max(self.load_casts(bundle), 0 if self.device.in_place else bundle.cast_bytes())

    def rows(self, bundles: Sequence[Bundle]) -> int:
        """Count what is kept for the rows of tables, a few megabytes of which are looked up at once."""
        largest = max((bundle.nbytes for bundle in bundles if bundle.by_rows), default=0)
        return 0 if self.device.in_place else min(ROWS_BYTES, largest // 8)

    def arena(
        self, resident: Sequence[Bundle], offloaded: Sequence[Bundle], plan: LoadPlan, window: Window, room: int
    ) -> int:
        """Count the bytes that transfers may go to, of the `room` that all on its way has.

        resident: those that stay. They come once, and what is cast then arrives here too.
        """
        coming = [bundle for bundle in resident if bundle.views is None]
        through = [b.source_bytes for b in coming if not (b.source_is_final or b.only_patched)]
        casts = max(map(self.makes, coming), default=0)
        if plan.state is LoadState.FULL:
            return min(room, max(aligned(max(through, default=0)), min(window(through), room - casts)))
        casts = max(casts, max(map(self.casts, offloaded), default=0))
        largest = max((aligned(nbytes) for nbytes in (*through, *map(self.buffer, offloaded))), default=0)
        return min(room, max(largest, min(plan.reserve, room) - casts))
