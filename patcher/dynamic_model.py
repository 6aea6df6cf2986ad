"""Runs a module whose weights come when they are used and give way when memory is wanted."""

from __future__ import annotations

import time
import weakref
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..ops.device.backend import Backend, backend_for
from ..ops.device.careful_backend import CarefulBackend
from ..ops.device.out_of_memory import is_out_of_memory
from ..ops.files.check_before_read import waiting_for_reads
from ..ops.files.source import Source
from ..ops.ledger import Ledger, in_words
from ..ops.lending.bundle import Bundle, Lender
from ..ops.lending.param import Patch
from ..ops.lending.pins import Pins
from ..ops.lending.table import leave_order, note_tables
from ..ops.ram import shortage
from ..ops.ram.available import total_ram
from ..ops.vbar.aimdo import serves
from . import order_record
from .arrival import foresee
from .attach import ModelDtype, Quantise, attach, collect_bundles, detach, load_buffers
from .buffers import PlacedBuffers
from .figures import Figures
from .first_forward import FirstForward
from .first_use.check import first_use
from .first_use.verdict import COPIES, VBAR, Verdict
from .headroom import headroom_bytes
from .policy import Policy
from .ram_pressure import give_pins, pin_budget, relieve, room_for_pins
from .remembered import Remembered
from .residency import Residency
from .use_costs import UseCosts
from .writes import follow_writes, note_kept

# Every dynamic model that is alive, for the memory report and for freeing.
models: weakref.WeakSet[DynamicModel] = weakref.WeakSet()


class _AllPins:
    """The pins of all models, which give way where memory is refused."""

    def give_ram(self, nbytes: int) -> int:
        return give_pins(models, nbytes)


_all_pins = _AllPins()
shortage.register(_all_pins)


class DynamicModel(Figures):
    """Runs `module` with weights from `source` on `device`, within `policy`.

    The constructor reads and maps nothing. The first forward reserves memory. `source` None takes the module's own
    parameters. A call of the model calls the module. model_dtype, quantise, blocks: see `collect_bundles`. backend: a
    device of another kind, for tests. may_init: initialise comfy-aimdo where nobody has. first_use_file: keeps what the
    check of a device found (see `first_use`) from one process to the next. None keeps it for this one. orders_file:
    keeps in which order layers ran (see `order_record`). sketch: only to ask for a forecast, so it is on no list and
    logs nothing. Raises SourceError, Unsupported or DeviceError where module, source and device do not fit together.

    residency: set while the model is prepared, that is from its first forward until `release`.
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
        quantise: Quantise | None = None,
        backend: Backend | None = None,
        may_init: bool = True,
        blocks: Collection[str] = (),
        first_use_file: Path | None = None,
        orders_file: Path | None = None,
        sketch: bool = False,
    ) -> None:
        self.module = module
        self.backend = backend if backend is not None else backend_for(device)
        self.asked = policy or Policy()  # with shares where it has some
        self.policy = self._in_bytes(self.asked)
        self.device = self.backend.device
        self.ledger = Ledger(name or type(module).__name__, quiet=sketch)
        with waiting_for_reads():  # a quantised weight may copy its scales where it is only looked at
            self.bundles = collect_bundles(module, source, self.policy, model_dtype, quantise, blocks)
        self._files = {disk_map for bundle in self.bundles for disk_map in bundle.maps()}
        self.by_key = {param.key: bundle for bundle in self.bundles for param in bundle.params}
        if source is not None:
            load_buffers(module, source)
        # CarefulBackend stands around every device call that can fail. On a CPU none can.
        self._device = self.backend if self.backend.in_place else CarefulBackend(self.backend, self.ledger)
        self._may_init = may_init
        self._first_use_file = first_use_file
        ran = order_record.read(orders_file, self.bundles)
        self._remembered = Remembered(ran or self.bundles, foreseen=ran is not None)
        self._remembered.note_order = partial(order_record.write, orders_file, self.bundles)
        self.residency: Residency | None = None
        self.pins: Pins | None = None  # may outlive a residency
        self._unused_pins = 0  # bytes of their blocks that no bundle may fit into
        self.last_used = 0.0  # time.monotonic() of the last step
        self._placed = PlacedBuffers(module, self.device)
        self._is_coming = any(bundle.coming for bundle in self.bundles)
        foresee(self._remembered.order, soon=False)
        self._peak = self._peak_held = 0  # bytes, the most of the residencies that have ended
        attach(self.bundles, self._idle_device)
        note_kept(self.bundles, self.ledger)
        self._lend_through(FirstForward(self.prepare, self.ledger))
        note_tables(self.bundles, self.ledger)
        if not sketch:
            models.add(self)

    # -- running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward. Where it runs out of memory, evict all weights before the error goes on.

        The forward is not run again, as it may have changed its inputs. Single ops are, in their layer.
        """
        if self.residency is not None:
            self.residency.caster.expect_step()
        try:
            with self.backend.current():
                if self.residency is None:
                    self.place_buffers()  # what the module reads before its first layer must be there already
                return self.module(*args, **kwargs)
        except Exception as error:
            freed = 0
            if is_out_of_memory(error) and self.residency is not None:
                self.residency.learn_from_failure()
                freed = self.free()
            if freed:
                self.ledger.decide(f"out of memory: freed {in_words(freed)} of weights for whoever tries next")
            raise
        finally:
            self.after_run()

    def after_run(self) -> None:
        """Note the peak after a forward, also a failed one. Release where the policy says so."""
        if self.residency is not None:
            self.residency.note_peak()
            self.residency.drop_buffers()
        if self.policy.keep == "free after use":
            self.release()

    def prepare(self) -> Residency:
        """Reserve addresses and choose the residency plan, in the first forward. Raises what `Residency` raises."""
        if self.residency is None:
            self._heed_first_use()
            if self.pins is None:
                self.pins = Pins(self._device, self._pin_budget(), room_for_pins)
            try:
                self.place_buffers()
                residency = Residency(
                    self._device,
                    self.bundles,
                    self.policy,
                    self.pins,
                    self.ledger,
                    self._remembered,
                    self._may_init,
                    self.placed_bytes,
                )
                foresee(self._remembered.order, soon=True)
                residency.caster.on_step = partial(self._on_step, residency)
                self.residency = residency
            except BaseException:
                self.release()  # otherwise the next forward would take the model for prepared
                raise
            self._lend_through(residency.caster)
        return self.residency

    def first_use(self) -> Verdict:
        """Say what is known to be wrong on the device. The first call for a device finds that out. Never raises."""
        aimdo = self.policy.vbar != "software"
        return first_use(self.backend, self._first_use_file, aimdo=aimdo, may_init=self._may_init)

    def _heed_first_use(self) -> None:
        """Do without what is wrong on the device."""
        verdict = self.first_use()
        verdict.step_down(self._device, self.ledger)
        if not verdict.trusts(VBAR):
            self._remembered.aimdo_failure = verdict.failed.get(VBAR, verdict.failed.get(COPIES))

    def check_files(self) -> None:
        """Raise FileChanged where a file of the model has changed since it was opened. A few microseconds."""
        for disk_map in self._files:
            disk_map.check_unchanged()

    @property
    def is_coming(self) -> bool:
        """Say whether weights have yet to come into their file."""
        return not all(bundle.has_come() for bundle in self.bundles)

    def _stand_by_themselves(self) -> None:
        """Let weights that have come be read where they lie, where the device computes in host memory."""
        self._is_coming = self.is_coming
        if not self._is_coming:
            for bundle in self.bundles:
                bundle.arrive()  # they have: it lets go of the download
                bundle.stand_in(self._idle_device)

    def _lend_through(self, lender: Lender) -> None:
        for bundle in self.bundles:
            bundle.lender = lender

    def _on_step(self, residency: Residency) -> None:
        """Begin a step: learn from the step before, then use a budget that has grown."""
        self.check_files()
        if self._is_coming:
            self._stand_by_themselves()
        self.ledger.begin_step(residency.caster.ahead_bytes)
        self.last_used = time.monotonic()
        relieve(models)
        if follow_writes(self.bundles, residency.caster):
            note_kept(self.bundles, self.ledger)
        residency.begin_step()
        if residency.vbar.loaded_size() < self.total_bytes:
            self._prioritize(residency)
        residency.follow_budget()

    def rebuild_if_resized(self) -> None:
        """Give addresses to bundles whose size a patch has changed. Done when a step begins."""
        if self.residency is not None:
            self.residency.rebuild_if_resized()

    # -- policy

    @property
    def headroom(self) -> int:
        """Give the bytes to keep free on the device for the computation."""
        return headroom_bytes(self.policy, self._device)

    def cost(self, bundle: Bundle) -> int:
        """Count the bytes of temporary device memory that one use of an offloaded bundle costs on this device."""
        return UseCosts(self._device).use(bundle)

    def _pin_budget(self) -> int:
        held = self.pins.held if self.pins is not None else 0
        return pin_budget(self.policy, self.total_bytes + self._unused_pins, held, self.backend.in_place)

    @property
    def rank(self) -> float:
        """Rank models for giving way, the lowest first. Among equals the least recently used gives way first."""
        return float("inf") if self.policy.keep == "always" else self.policy.priority

    def _prioritize(self, residency: Residency) -> None:
        residency.vbar.prioritize()
        above = [m for m in list(models) if m.device == self.device and m.rank > self.rank]
        for model in sorted(above, key=lambda m: m.rank):
            if model.residency is not None:
                model.residency.vbar.prioritize()

    def _in_bytes(self, policy: Policy) -> Policy:
        if (policy.vram_share, policy.headroom_share, policy.pinned_share) == (None, None, None):
            return policy
        _, total = self.backend.memory()
        return policy.in_bytes(total, total_ram())

    def set_policy(self, policy: Policy) -> None:
        """Change what the model may take, up or down. It takes effect at once. Call it between steps.

        Raises ValueError for a change of rules, which needs a new model. Raises RuntimeError where the policy forces a
        VBAR that cannot be had.
        """
        if policy.rules != self.policy.rules:
            raise ValueError(
                "the rules of a policy are read when the model is made: load the model again with the new ones."
            )
        in_bytes, residency = self._in_bytes(policy), self.residency
        if residency is not None:
            residency.set_policy(in_bytes)
        self.asked, self.policy = policy, in_bytes
        if residency is None:
            return
        residency.pins.set_budget(self._pin_budget())
        residency.follow_policy()
        self._prioritize(residency)

    def expect_use(self, nbytes: int | None = None, shown: int | None = None) -> None:
        """Take the first place on the device: the model is about to be used, by whatever way into it.

        nbytes: what its computation is said to need, which weights leave free until the next call. None: as before.
        shown: what an equal one took in an earlier run, which they leave free in its place.
        """
        self.ledger.begin_use()
        changed = nbytes is not None and self._remembered.expect(nbytes, shown)
        residency = self.residency
        if residency is not None:
            with residency.caster.lock, self._device.current():
                residency.caster.expect_step()
                self._remembered.timed = 0  # the steps to come may be of another size
                residency.pins.budget = self._pin_budget()  # RAM may have come free since
                self._prioritize(residency)
                residency.begin_use(changed)

    # -- patches

    def set_patches(self, patches: Mapping[str, Patch], changed: Iterable[str] | None = None) -> int:
        """Attach functions by parameter key, and drop all earlier ones. Each maps the weight, in the model's dtype, to
        the patched weight.

        changed: keys whose patch has changed (default: every key that has or had a patch). Only their bundles are
        gathered and patched again. Returns the number of bundles touched.
        """
        if changed is None:
            had = {param.key for bundle in self.bundles for param in bundle.params if param.patch is not None}
            changed = had | set(patches)
        residency = self.residency
        if residency is not None:
            residency.caster.cancel_prefetch()
        touched = {self.by_key[key] for key in changed if key in self.by_key}
        for bundle in self.bundles:
            for param in bundle.params:
                param.set_patch(patches.get(param.key))
        resized = False
        for bundle in touched:
            if bundle.invalidate():
                resized = True
                if residency is not None:
                    bundle.move_to(None)  # its slice has the old size
                    residency.resized = True
            bundle.stand_in(self._idle_device)
        leave_order(self.bundles)
        if self.pins is not None and resized:
            # Blocks that were cut for smaller weights leave up to one bundle unused.
            self._unused_pins = max((bundle.nbytes for bundle in self.bundles if not bundle.by_rows), default=0)
            self.pins.set_budget(self._pin_budget())  # else what patches have made larger is made anew at every use
        return len(touched)

    # -- memory

    @property
    def _idle_device(self) -> torch.device | None:
        return None if self.backend.in_place else self.device

    def place_buffers(self) -> None:
        """Move the module's buffers to the device, where any code may read them. `release` moves them back."""
        self._placed.place()

    def free(self, nbytes: int | None = None) -> int:
        """Evict weights from the device until `nbytes` are free (None: all). Returns the bytes freed.

        Safe between steps and from another thread, as lent bundles stay.
        """
        return self.residency.free(nbytes) if self.residency is not None else 0

    @property
    def is_running(self) -> bool:
        """Say whether a bundle is lent now."""
        return any(bundle.loan is not None for bundle in self.bundles)

    @property
    def sees_allocations(self) -> bool:
        """Say whether the weights give way by themselves when the computation allocates."""
        if self.residency is not None:
            return self.residency.vbar.follows_free_memory
        served = self.policy.vbar != "software" and self._remembered.aimdo_failure is None
        return served and serves(self._device, self._may_init)[0]

    @property
    def must_be_told(self) -> bool:
        """Say whether `expect_use` decides how much the weights may hold."""
        return not self.backend.in_place and not self.sees_allocations

    def free_for_computation(self, margin: float = 1.0) -> int:
        """Count the bytes that a computation may take on the device once the weights have come.

        margin: by how much more than it needs it asks for.
        """
        free, _ = self._device.memory()
        expected = int(margin * self._remembered.expected)
        if self.residency is None:
            return max(free - self.total_bytes, min(expected, free))
        return self.residency.free_for_computation(free, expected)

    def free_buffers(self) -> int:
        """Give the buffers back that bundles pass through. Returns the bytes of device memory that were freed."""
        return self.residency.caster.free_buffers() if self.residency is not None else 0

    def free_pins(self, nbytes: float = float("inf"), wait: bool = True) -> int:
        """Give pinned host memory back. Returns the bytes freed.

        wait: False returns 0 where a loan begins or ends at this moment. True waits for it.
        """
        if self.pins is None:
            return 0
        caster = self.caster
        if caster is None:
            return self.pins.free(nbytes)
        if not caster.lock.acquire(blocking=wait):
            return 0
        try:
            caster.cancel_prefetch()  # a pin that a reader fills would have to be waited for
            return self.pins.free(nbytes)
        finally:
            caster.lock.release()

    def release(self, pins: bool = True) -> None:
        """Give back all memory of the device, and the pins too where `pins` is True. The next forward begins anew.

        With its pins kept, a model whose patches stay the same is back with one transfer for each bundle. Raises
        DeviceError where the device does not answer, after giving back all that it can.
        """
        residency = self.residency
        if residency is not None:
            try:
                residency.close()
            finally:
                self._peak = max(self._peak, residency.peak_bytes)
                self._peak_held = max(self._peak_held, residency.peak_held)
                self.residency = None
                self._lend_through(FirstForward(self.prepare, self.ledger))
        self._placed.give_back()
        if pins and self.pins is not None:
            self.pins.free(float("inf"))
            self.pins = None

    def close(self) -> None:
        """Release everything and make the module an ordinary one again, with its weights where the source has them.

        Raises DeviceError where the device does not answer. The module is an ordinary one all the same.
        """
        try:
            self.release()
        finally:
            detach(self.bundles)
            models.discard(self)
