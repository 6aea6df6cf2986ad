"""Keeps what a model knows from one residency to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ops.lending.bundle import Bundle
from .load_plan import LoadPlan


@dataclass
class Remembered:
    """What a model knows from one residency to the next.

    order: the bundles as they run, or as registered until a step was traced. aimdo_failure: why this model has given
    comfy-aimdo's VBAR up. plan: the last plan that the ledger was told of. expected: bytes that the computation is said
    to need. learnt: bytes that it was seen to need beyond that. window: bundles on their way, at their largest, that
    the device keeps room for.
    """

    order: Sequence[Bundle]
    traced: bool = False
    aimdo_failure: str | None = None
    plan: LoadPlan | None = None
    expected: int = 0
    learnt: int = 0
    window: int = 4

    def expect(self, nbytes: int) -> bool:
        """Note what the computation is said to need. Says whether that is a change, which voids what was learnt."""
        changed = nbytes != self.expected
        if changed:
            self.expected, self.learnt = nbytes, 0
        return changed
