"""The dynamic model: a module whose weights come when they are used and give way when memory is wanted."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from ..ops.backend import Backend, backend_for
from ..ops.bundle import Bundle, Patch
from ..ops.careful_backend import CarefulBackend
from ..ops.caster import Caster
from ..ops.device_caster import DeviceCaster
from ..ops.host_caster import HostCaster
from ..ops.layer import is_out_of_memory
from ..ops.ledger import Ledger, in_words
from ..ops.pins import Pins
from ..ops.software_vbar import SoftwareVBAR
from ..ops.source import Source
from ..ops.vbar import VBAR
from .attach import Int8Choice, ModelDtype, attach, collect_bundles, detach, load_buffers
from .choose_vbar import choose_vbar
from .eviction import on_eviction
from .load_plan import LoadPlan, LoadState, interleave, plan_load, plan_unload
from .policy import Policy
from .ram_pressure import available_ram, ease
from .unprepared import Unprepared
from .writes import follow_writes, note_kept

GIB = 1 << 30

# Every dynamic model that is alive, for the memory report and for freeing.
models: weakref.WeakSet[DynamicModel] = weakref.WeakSet()


def default_headroom(backend: Backend) -> int:
    """Bytes kept free where the policy says nothing: a twentieth of the device, between 0.5 and 2 GiB."""
    _, total = backend.memory()
    return min(max(total // 20, GIB // 2), 2 * GIB)


class DynamicModel:
    """Runs `module` with weights from `source` on `device`, within `policy`.

    Making one reads nothing and maps nothing: memory is reserved in the first forward. `source` None takes the module's
    own parameters. Calling it calls the module. model_dtype, int8, blocks: see `collect_bundles`. backend: a device of
    another kind, for tests. may_init: initialise comfy-aimdo where nobody has. Raises SourceError, Unsupported or
    DeviceError where module, source and device do not fit together.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        source: Source | None = None,
        device: str | torch.device = "cpu",
        policy: Policy | None = None,
        *,
        name: str | None = None,
        model_dtype: ModelDtype | None = None,
        int8: Int8Choice | None = None,
        backend: Backend | None = None,
        may_init: bool = True,
        blocks: Collection[str] = (),
    ) -> None:
        self.module = module
        self.policy = policy or Policy()
        self.backend = backend if backend is not None else backend_for(device)
        self.device = self.backend.device
        self.ledger = Ledger(name or type(module).__name__)
        # Everything that can fail on a device goes through this; on a CPU nothing can.
        self._device = self.backend if self.backend.in_place else CarefulBackend(self.backend, self.ledger)
        self.may_init = may_init
        self._aimdo_failure: str | None = None  # why this model has given comfy-aimdo's VBAR up
        self.bundles = collect_bundles(module, source, self.policy, model_dtype, int8, blocks)
        self.by_key = {param.key: bundle for bundle in self.bundles for param in bundle.params}
        if source is not None:
            load_buffers(module, source)
        self.caster: Caster | None = None
        self.pins: Pins | None = None
        self.last_used = 0.0  # time.monotonic() of the last step
        self.plan: LoadPlan | None = None
        self._peak = 0
        self.fixed_bytes = 0  # placed on the device for good by the host, beside the VBAR
        self._order: list[Bundle] = self.bundles
        self._addresses: list[Bundle] = []
        self._planned_for = 0  # changes of the pins that the plan knows of
        self._traced = False
        self._resized = False  # bundles are not as large as the addresses that they were given
        attach(self.bundles)
        note_kept(self.bundles, self.ledger)
        self._use(Unprepared(self))
        models.add(self)

    # -- running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward. Where it runs out of memory, all weights are evicted before the error goes on.

        A model is not run again by itself: it may have changed what it was given. Single ops are, in their layer.
        """
        try:
            with self.backend.current():
                return self.module(*args, **kwargs)
        except Exception as error:
            freed = self.free() if is_out_of_memory(error) else 0
            if freed:
                self.ledger.decide(f"out of memory: freed {in_words(freed)} of weights for whoever tries next")
            raise
        finally:
            self.after_run()

    def after_run(self) -> None:
        """A forward has ended, well or not: what was begun ahead of the next one is kept only if it will be used."""
        self.note_peak()
        if self.policy.keep == "free after use":
            self.release()

    def prepare(self) -> None:
        """Reserve addresses and choose the residency plan. Done by the first forward."""
        if self.caster is not None:
            return
        vbar = self._choose_vbar()
        if self.pins is None:
            self.pins = Pins(self._device, self._pin_budget(), self._order)
        pins = self.pins
        if self.backend.in_place:
            caster: Caster = HostCaster(self._device, vbar, pins, self.ledger)
        else:
            caster = DeviceCaster(self._device, vbar, pins, self.ledger, self.policy.prefetch, self.policy.streams)
        caster.on_step = self._on_step
        self.caster = caster
        try:
            self._move_buffers()
            self._lay_out(vbar)
            self._apply(self._new_plan())
        except BaseException:
            self.release()  # else the next forward would take it for prepared
            raise
        self._use(caster)

    def _choose_vbar(self) -> VBAR:
        # 512 bytes of alignment for each bundle.
        nbytes = sum(bundle.nbytes + 512 for bundle in self.bundles)
        return choose_vbar(
            self._device, self.policy, self.headroom, nbytes, self.ledger, self.may_init, self._aimdo_failure
        )

    def _pin_budget(self) -> int:
        if self.policy.pinned_bytes is not None:
            return self.policy.pinned_bytes
        # Half of what the machine has left: pins are a cache of the file, never a reason to swap. On a CPU they hold
        # nothing but patched weights for which the budget has no room, which would be computed at every use.
        return min(sum(bundle.nbytes for bundle in self.bundles), available_ram() // 2)

    def _move_buffers(self) -> None:
        for module in self.module.modules():
            for attr, buffer in module._buffers.items():
                if buffer is not None and buffer.device != self.device and not buffer.is_meta:
                    module._buffers[attr] = buffer.to(self.device)

    def _lay_out(self, vbar: VBAR) -> None:
        """Allocate every bundle's addresses, the lowest for those that should stay."""
        self._resized = False
        on_evict = {bundle: on_eviction(bundle, self.ledger) for bundle in self.bundles}
        self._addresses = interleave([b for b in self._order if self._may_reside(b)], self.cost)
        for bundle in self._addresses:
            bundle.piece = vbar.alloc(bundle.nbytes, on_evict[bundle])  # type: ignore[call-arg]
        for bundle in self.bundles:
            bundle.signature = bundle.views = None
            if not self._may_reside(bundle):
                bundle.piece = None

    def _may_reside(self, bundle: Bundle) -> bool:
        rule = self.policy.rule_for(bundle.name)
        return rule is None or rule.resident

    def _use(self, caster: Any) -> None:
        for bundle in self.bundles:
            bundle.module.spillway_caster = caster

    # -- budget

    @property
    def headroom(self) -> int:
        """Bytes kept free on the device for the computation."""
        wanted = self.policy.headroom_bytes
        return default_headroom(self._device) if wanted is None else wanted

    def cost(self, bundle: Bundle) -> int:
        """Bytes of temporary device memory that one use of an offloaded bundle costs on this device."""
        if not self.backend.in_place:
            return bundle.offload_cost()
        return 0 if bundle.in_place or bundle.finished else bundle.offload_cost() - bundle.store_bytes

    def budget(self) -> int | None:
        """Bytes that the weights may hold on the device now; None where only what is free limits them."""
        return self.policy.vram_bytes

    def _new_plan(self) -> LoadPlan:
        """What fits now. Changes of the pins up to here are taken note of."""
        assert self.caster is not None
        self._planned_for = self.caster.pins.changes
        budget = self.budget()
        available = max(0, self._within_reach()) if budget is None else budget
        return plan_load(self._addresses, available, min(self.policy.streams, self.backend.streams), self.cost)

    def _apply(self, plan: LoadPlan) -> None:
        assert self.caster is not None
        vbar, budget, before = self.caster.vbar, self.budget(), self.plan
        self.plan = plan
        if budget is None:
            free, _ = self._device.memory()
            # comfy-aimdo sees every allocation as it happens; the software VBAR is told at each step.
            vbar.set_limit(plan.limit if vbar.kind == "software" else None)
            reason = f"{in_words(free)} free, {in_words(self.headroom)} headroom"
        else:
            vbar.set_limit(plan.limit)
            reason = f"budget {in_words(budget)} set by the policy"
        if plan != before:
            self.ledger.decide(plan.in_words(self.total_bytes, reason))
        largest = max((self.cost(bundle) for bundle in self.bundles), default=0)
        if budget is not None and largest > budget:
            self.ledger.decide_once(
                f"the budget of {in_words(budget)} is smaller than the {in_words(largest)} that the largest bundle "
                "needs while it is used: nothing stays resident, and the peak is that bundle.",
                level=logging.INFO,
            )

    def _grow(self) -> None:
        """Use what was set aside for computing patches that are now computed and pinned.

        It never shrinks: patches that change at every step would evict what they do not touch.
        """
        assert self.plan is not None
        plan = self._new_plan()
        if plan.limit > self.plan.limit:
            self._apply(plan)

    def _within_reach(self) -> int:
        """Bytes that the weights could hold: what they hold, what is free, and what gives way to them."""
        assert self.caster is not None
        vbar, (free, _) = self.caster.vbar, self._device.memory()
        below = vbar.held_below() if isinstance(vbar, SoftwareVBAR) else 0
        return vbar.loaded_size() + free + below - self.headroom

    def _on_step(self) -> None:
        """A step begins: take note of the one before, follow the execution order, use a budget that has grown."""
        assert self.caster is not None
        self.ledger.counters.steps += 1
        self.note_peak()
        self.last_used = time.monotonic()
        ease(models)
        if follow_writes(self.bundles, self.caster):
            note_kept(self.bundles, self.ledger)
        failure = self.caster.vbar.failure
        if failure is not None and not any(bundle.loan for bundle in self.bundles):
            self._aimdo_failure = failure
            self._rebuild()
        self.settle()
        if not self._traced and self.ledger.counters.steps > 1:
            self._follow_trace()
        if self.caster.vbar.loaded_size() < self.total_bytes:
            self._prioritize()
        if self.caster.pins.changes != self._planned_for:
            self._grow()
        elif self.budget() is None and self.caster.vbar.kind == "software":
            self._follow_free_memory()

    def settle(self) -> None:
        """Give addresses to bundles whose size a patch has changed. Done when a step begins."""
        if self._resized and self.caster is not None and not any(bundle.loan for bundle in self.bundles):
            self._rebuild()

    @property
    def rank(self) -> float:
        """The order in which models give way, the lowest first; among equals the least recently used."""
        return float("inf") if self.policy.keep == "always" else self.policy.priority

    def _prioritize(self) -> None:
        assert self.caster is not None
        self.caster.vbar.prioritize()
        above = [m for m in models if m.device == self.device and m.rank > self.rank]
        for model in sorted(above, key=lambda m: m.rank):
            if model.caster is not None:
                model.caster.vbar.prioritize()

    def _follow_free_memory(self) -> None:
        """Without a budget: shrink at once when the headroom is gone, grow when clearly more is free."""
        assert self.caster is not None and self.plan is not None
        allowed = self._within_reach()
        grown = allowed > self.plan.limit + GIB // 4 and self.plan.state is not LoadState.FULL
        if allowed < min(self.plan.limit, self.total_bytes) or grown:
            self._apply(self._new_plan())

    def _follow_trace(self) -> None:
        """Lay the bundles out again where the first step ran them in another order than they are registered in."""
        assert self.caster is not None
        self._traced = True
        order = self.execution_order()
        if isinstance(self.caster, HostCaster):
            maps = {disk_map for bundle in self.bundles for disk_map in bundle.maps()}
            # A file that fits into the free memory is in the page cache by now.
            self.caster.advise = sum(m.file_bytes for m in maps) > self._device.memory()[0] // 2
        if order == self._order:
            return
        self._order = order
        if self.plan is not None and self.plan.state is LoadState.PARTIAL:
            self.ledger.decide(
                "the first step ran the bundles in another order than they are registered: laid out anew"
            )
            self._rebuild()

    def execution_order(self) -> list[Bundle]:
        """The bundles in the order of the last step; those that did not run come last."""
        order: dict[Bundle, None] = {}
        bundle = self.caster.first if self.caster is not None else None
        while bundle is not None and bundle not in order:
            order[bundle] = None
            bundle = bundle.successor
        return list(order) + [bundle for bundle in self.bundles if bundle not in order]

    def _rebuild(self) -> None:
        """Give the VBAR back and lay out a new one. No bundle may be lent."""
        caster = self.caster
        assert caster is not None
        with caster.lock:
            caster.forget()
            self.note_peak()
            vbar = self._choose_vbar()  # first: it may be refused
            self._give_vbar_back(caster)
            caster.vbar = vbar
            self._lay_out(vbar)
            self._apply(self._new_plan())

    def _give_vbar_back(self, caster: Caster) -> None:
        caster.vbar.close()
        for bundle in self.bundles:
            bundle.piece = bundle.signature = bundle.views = None

    def set_policy(self, policy: Policy) -> None:
        """Change what the model may take; between steps, at once, up and down.

        A change of rules needs a new model: it raises ValueError. RuntimeError: a kind of VBAR that cannot be had.
        """
        if policy.rules != self.policy.rules:
            raise ValueError(
                "the rules of a policy are read when the model is made: load the model again with the new ones."
            )
        before, self.policy = self.policy, policy
        if self.caster is None:
            return
        self.caster.forget()  # what was begun ahead could not be evicted
        if policy.vbar != before.vbar:
            try:
                self._rebuild()
            except RuntimeError:
                self.policy = before
                raise
        self.caster.pins.budget = self._pin_budget()
        self.caster.pins.free(self.caster.pins.held - self.caster.pins.budget)
        headroom = getattr(self.caster.vbar, "headroom", None)
        if headroom is not None:
            self.caster.vbar.headroom = self.headroom  # type: ignore[attr-defined]
        self._apply(self._new_plan())
        self._prioritize()

    # -- patches

    def set_patches(self, patches: Mapping[str, Patch], changed: Iterable[str] | None = None) -> int:
        """Attach functions by parameter key: weight in the model's dtype -> patched weight. Replaces all earlier ones.

        changed: keys whose patch is not what it was (default: every key that has or had one). Only their bundles are
        gathered and patched again. Returns the number of bundles touched.
        """
        if changed is None:
            had = {param.key for bundle in self.bundles for param in bundle.params if param.patch is not None}
            changed = had | set(patches)
        if self.caster is not None:
            self.caster.forget()
        touched = {self.by_key[key] for key in changed if key in self.by_key}
        for bundle in self.bundles:
            for param in bundle.params:
                param.set_patch(patches.get(param.key))
        for bundle in touched:
            if bundle.touch():  # its range holds the old size
                bundle.piece = None
                self._resized = True
        return len(touched)

    # -- memory

    def note_peak(self) -> None:
        """Remember the most that was resident, before its VBAR goes or shrinks."""
        caster = self.caster
        if caster is not None:
            self._peak = max(self._peak, caster.vbar.peak_size())

    @property
    def peak_resident_bytes(self) -> int:
        """The most bytes of the VBAR that were mapped, ever."""
        self.note_peak()
        return self._peak

    @property
    def total_bytes(self) -> int:
        """Bytes of all bundles in their finished form."""
        return sum(bundle.nbytes for bundle in self.bundles)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the VBAR that are mapped now."""
        return self.caster.vbar.loaded_size() if self.caster is not None else 0

    @property
    def pinned_bytes(self) -> int:
        """Bytes held in pins."""
        return self.pins.held if self.pins is not None else 0

    @property
    def vbar_kind(self) -> str:
        """'aimdo', 'software', or 'none' before the first forward."""
        return self.caster.vbar.kind if self.caster is not None else "none"

    def residency(self) -> list[tuple[str, int, bool]]:
        """(bundle, bytes, resident) in execution order."""
        vbar = self.caster.vbar if self.caster is not None else None
        return [
            (bundle.name, bundle.nbytes, vbar is not None and bundle.piece is not None and vbar.resident(bundle.piece))
            for bundle in self.execution_order()
        ]

    def free(self, nbytes: int | None = None) -> int:
        """Evict weights from the device until `nbytes` are free (None: all). Returns the bytes freed.

        Safe between steps and from another thread: what is lent stays.
        """
        caster = self.caster
        if caster is None:
            return 0
        with caster.lock:
            self.note_peak()
            if nbytes is None:
                return caster.free()
            vbar = caster.vbar
            resident = [
                bundle for bundle in self._addresses if bundle.piece is not None and vbar.resident(bundle.piece)
            ]
            reserve = self.plan.reserve if self.plan is not None else 0
            wanted = plan_unload(resident, nbytes, reserve, self.backend.streams, self.cost)
            return vbar.free_memory(wanted)

    def free_pins(self, nbytes: float = float("inf"), wait: bool = True) -> int:
        """Give pinned host memory back; returns the bytes freed. wait: while a loan begins or ends, else return 0."""
        caster, pins = self.caster, self.pins
        if pins is None:
            return 0
        if caster is None:
            return pins.free(nbytes)
        if not caster.lock.acquire(blocking=wait):
            return 0
        try:
            return pins.free(nbytes)
        finally:
            caster.lock.release()

    def release(self, pins: bool = True) -> None:
        """Give back all memory of the device, and of pins too unless told not to. The next forward begins anew.

        With its pins kept, a model whose patches stay the same is back with one transfer for each bundle. Raises
        DeviceError where the device does not answer; what can be given back has been, all the same.
        """
        caster = self.caster
        if caster is not None:
            with caster.lock:
                self.note_peak()
                try:
                    caster.close()
                finally:
                    self._give_vbar_back(caster)
                    for bundle in self.bundles:
                        bundle.drop_pages()
                    self.caster = None
                    self._use(Unprepared(self))
        if pins and self.pins is not None:
            self.pins.free(float("inf"))
            self.pins = None

    def close(self) -> None:
        """Release everything; the module is a plain one again, with its weights where the source has them."""
        try:
            self.release()
        finally:
            detach(self.bundles)
            models.discard(self)
