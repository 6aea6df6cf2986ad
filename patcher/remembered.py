"""Keeps what a model knows from one residency to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..ops.device.backend import Backend
from ..ops.lending.bundle import Bundle
from ..ops.lending.stopwatch import Stopwatch
from .load_plan import LoadPlan
from .step_time import Pace

# Steps that are timed when a model begins to run. The first one may be the first of its kernels, too.
TIMED_STEPS = 2
SAME = 0.05  # of a step's computing: choosing a layout takes tens of milliseconds


@dataclass
class Remembered:
    """What a model knows from one residency to the next.

    order: the bundles as they run, or as registered until a step was traced. foreseen: the order is one in which they
    ran in an earlier process. aimdo_failure: why this model has given comfy-aimdo's VBAR up. plan: the last plan that
    the ledger was told of. expected: bytes that the computation is said to need. shown: that an equal one took in an
    earlier run, None where none was. learnt: bytes that it was seen to need beyond that. window: bundles on their way,
    at their largest, that the device keeps room for. pace: of the last step that was timed. recalled: it, or the bus in
    it, is of another process. timed: steps that were timed since the model was told to be used. chosen_for: the plan's
    limit, and the seconds of computing and the bus that the layout was chosen for. note_order: keeps the order for
    another process.
    """

    order: Sequence[Bundle]
    traced: bool = False
    foreseen: bool = False
    aimdo_failure: str | None = None
    plan: LoadPlan | None = None
    expected: int = 0
    shown: int | None = None
    learnt: int = 0
    window: int = 4
    pace: Pace | None = None
    recalled: bool = False
    timed: int = 0
    chosen_for: tuple[int, float, float] | None = None
    note_order: Callable[[Sequence[Bundle]], object] = lambda order: None

    def expect(self, nbytes: int, shown: int | None) -> bool:
        """Note what the computation is said to need, and what an equal one took.

        Says whether that is a change, which voids what was learnt of another computation.
        """
        changed = (nbytes, shown) != (self.expected, self.shown)
        if changed:
            same = nbytes == self.expected and (shown or 0) <= (self.shown or 0)
            self.expected, self.shown, self.learnt = nbytes, shown, self.learnt if same else 0
        return changed

    def recall_pace(self, pace: Pace) -> None:
        """Use what another process has measured, until a step of this one is timed."""
        self.pace, self.recalled = pace, True

    def note_pace(self, watch: Stopwatch | None) -> bool:
        """Note what a step has shown, if it was timed. Say whether it has shown anything.

        The bus is as fast as it ever was in this process. The card may be in another slot than it was in.
        """
        if watch is None:
            return False
        known = self.pace.bus if self.pace is not None else 0.0
        try:
            seconds, seen = watch.seconds(), watch.bus() or 0.0
        except RuntimeError:  # a device that tells no times after all
            return False
        bus = seen or known if self.recalled else max(seen, known)
        if seconds and bus:
            self.pace, self.recalled = Pace(seconds, bus), self.recalled and not seen
        return bool(seconds and bus)

    def is_other_step(self, limit: int) -> bool:
        """Say whether the last layout was chosen for another budget or bus, or for steps of clearly other length."""
        before = self.chosen_for
        now = self._step_within(limit)
        if before is None or before[0] != limit:
            return True
        return any(abs(one - other) > SAME * one for one, other in zip(now[1:], before[1:], strict=True))

    def note_choice(self, limit: int) -> None:
        """Note what the layout is chosen for."""
        self.chosen_for = self._step_within(limit)

    def _step_within(self, limit: int) -> tuple[int, float, float]:
        """Return the plan's limit, the seconds of computing and the bus."""
        assert self.pace is not None
        return limit, sum(self.pace.seconds.values()), self.pace.bus

    def next_watch(self, device: Backend) -> Stopwatch | None:
        """Return a watch where the next step is to be timed on a device that tells times."""
        if self.timed >= TIMED_STEPS or not device.streams or device.timer(None) is None:
            return None
        self.timed += 1
        return Stopwatch(device)
