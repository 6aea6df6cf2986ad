"""Foresees what the steps of a model that nobody runs yet will hold and bring, from the sizes of its bundles alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from ..ops.device.backend import Backend
from ..ops.lending.bundle import Bundle
from .dynamic_model import DynamicModel
from .load_plan import LoadPlan, LoadState
from .planning import Planning
from .policy import Policy
from .ram_pressure import pin_budget
from .remembered import Remembered


@dataclass(frozen=True)
class Place:
    """What the device is like. Bytes.

    reach: that weights could hold, were nothing kept free. unit: that come and go together. follows: whether weights
    give way by themselves when the computation allocates. capped: what the cap over all models leaves, None for none.
    bus: bytes a second, as measured here; None where nobody has.
    """

    reach: int
    unit: int = 1
    follows: bool = False
    capped: int | None = None
    bus: float | None = None


@dataclass(frozen=True)
class Forecast:
    """What each step of one model will be once it has settled. Bytes and seconds.

    streamed: brought at each step. weights_peak: the most that weights and those on their way hold together in a step.
    loading: that they do before the first one, while weights are quantised. computation: what the step's own tensors
    take. order_known: the order in which the layers run was seen, not guessed. bus: that a step takes of it at least.
    compute: that it computed, as last measured. step: that it takes, with the waits for the bus. Each is None where it
    is not known.
    """

    total: int
    resident: int
    streamed: int
    weights_peak: int
    loading: int
    computation: int
    placed: int
    state: LoadState
    order_known: bool
    bus: float | None
    compute: float | None
    step: float | None

    @property
    def peak(self) -> int:
        """Count the most bytes of the device that the model and its computation hold together."""
        return self.placed + max(self.loading, self.weights_peak + self.computation)

    @property
    def at_least(self) -> float | None:
        """Give the seconds below which no step can be. None where nothing was measured."""
        return max((part for part in (self.bus, self.compute, self.step) if part is not None), default=None)


def foresee(
    model: DynamicModel,
    place: Place,
    computation: int = 0,
    expected: int | None = None,
    idle: Callable[[Bundle], bool] = lambda bundle: False,
    shown: int | None = None,
) -> Forecast:
    """Foresee the steps of a sketch of a model, with its policy and patches. Nothing is read, and nothing allocated.

    computation: bytes that a step takes beside weights. expected: what it is said to need, `computation` by default.
    idle: says which bundles no step uses, such as those of a VAE's encoder when it decodes. shown: what an equal step
    took in an earlier run, which the plan then leaves free.
    """
    known = model.remembered
    remembered = replace(known, expected=computation if expected is None else expected, shown=shown, learnt=0)
    foresight = Foresight(model.backend, model.bundles, model.policy, remembered, model.due_bytes, place)
    return foresight.forecast(computation, order_known=known.foreseen or known.traced, idle=idle)


class Foresight(Planning):
    """Plans for bundles that are nobody else's: what a run writes down on them is written down on these too."""

    def __init__(
        self,
        device: Backend,
        bundles: Sequence[Bundle],
        policy: Policy,
        remembered: Remembered,
        placed_bytes: int,
        place: Place,
    ) -> None:
        super().__init__(device, bundles, policy, remembered, placed_bytes)
        self.place = place
        self._pinned = 0  # bytes that are left for pins

    @property
    def follows_free_memory(self) -> bool:
        return self.place.follows

    @property
    def unit(self) -> int:
        return self.place.unit

    def reach(self) -> int:
        return self.place.reach - self.placed_bytes

    def capped(self) -> int | None:
        return self.place.capped

    def forecast(self, computation: int, order_known: bool, idle: Callable[[Bundle], bool]) -> Forecast:
        """Foresee a step. computation: bytes that it takes beside weights. order_known: see Forecast. idle: of foresee.

        Those that no step uses have their place in the plan, and never come.
        """
        loading = self._loaded()
        plan, planned, most = self._settled()
        stays, stay = [bundle for bundle in planned if not idle(bundle)], set(planned)
        most -= sum(bundle.nbytes for bundle in planned if idle(bundle))
        brought = [bundle for bundle in self.bundles if bundle not in stay and not idle(bundle)]
        streamed = sum(map(self.costs.brought, brought))
        resident = sum(bundle.nbytes for bundle in stays)
        pace = self.remembered.pace
        speed = pace.bus if pace is not None else self.place.bus
        layouts = self.layouts()
        return Forecast(
            total=self.total_bytes,
            resident=resident,
            streamed=streamed,
            weights_peak=most,
            loading=loading,
            computation=computation,
            placed=self.placed_bytes,
            state=plan.state,
            order_known=order_known or plan.state is not LoadState.PARTIAL,
            bus=streamed / speed if speed else None,
            compute=sum(pace.seconds.values()) if pace is not None else None,
            step=layouts.expected(self.addresses, self.remembered.window, pace).seconds if pace is not None else None,
        )

    def _loaded(self) -> int:
        """Quantise as a load does, before anything computes. Return the most bytes held; 0 where it makes none."""
        self.addresses = self.layouts().guessed()
        self._pinned = self._pin_budget()
        made = [bundle for bundle in self.bundles if any(param.quantisation for param in bundle.params)]
        if not made:
            return 0
        plan = self.plan_of(self.addresses, self.window)
        stays = self.addresses[: plan.resident]
        held = self.held(plan, stays)
        self._pinned = self._keep_final_forms(set(stays), self._pinned, made)
        return held

    def _settled(self) -> tuple[LoadPlan, list[Bundle], int]:
        """Plan as a run does, step after step, until nothing changes -> (plan, what stays, the most bytes held)."""
        plan, most = self.plan_of(self.addresses, self.window), 0
        pinned = self._pinned
        while True:
            stays = self.addresses[: plan.resident]
            most = max(most, self.held(plan, stays))
            left = self._keep_final_forms(set(stays), pinned, self.bundles)
            again = self.plan_of(self.addresses, self.window)
            if again.limit > plan.limit:  # as memory for computing patches is wanted no more
                plan, pinned = again, left
                continue
            if self.remembered.pace is None or plan.state is not LoadState.PARTIAL:
                break
            layout, is_other = self.timed_layout()
            if not is_other:
                break
            self.remembered.window, self.addresses = layout.window, list(layout.addresses)
            plan, pinned = self.plan_of(self.addresses, self.window), left
        return plan, self.addresses[: plan.resident], most

    def _pin_budget(self) -> int:
        return pin_budget(self.policy, self.total_bytes, 0, self.device.in_place)

    def _keep_final_forms(self, stay: set[Bundle], budget: int, made: Collection[Bundle]) -> int:
        """Note pins of what is made and would be made again, in the order of use. Return the budget that is left."""
        may = set(made)
        for bundle in dict.fromkeys([*self.remembered.order, *self.bundles]):
            wanted = bundle in may and bundle not in stay and not bundle.by_rows and self.costs.keeps_final_form(bundle)
            if wanted and not bundle.pin_is_current and bundle.nbytes <= budget:
                bundle.pin_changed(bundle.version)
                budget -= bundle.nbytes
        return budget
