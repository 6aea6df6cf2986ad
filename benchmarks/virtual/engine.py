"""The engine itself on the virtual clock: DynamicModel with its caster, VBAR and pins, at its default settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

from kit.virtual.backend import VirtualBackend
from kit.virtual.clock import TO_DEVICE, Clock, Mark, Span
from kit.virtual.devices import Machine
from kit.virtual.layers import BF16, FP8, Model, narrow
from kit.virtual.math import LowRankPatch, virtual_math
from kit.virtual.page_cache import PageCache
from spillway.ops.gather import tensor_bytes
from spillway.ops.ram import available
from spillway.patcher import ram_pressure
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.policy import Policy
from spillway.patcher.quantised_layers import Int8Layers
from spillway.patcher.step_time import Pace

from .limits import ram_for_weights

FEWEST, MOST = 4, 7  # steps; it is done when two take the same time


@dataclass
class Known:
    """What a process has measured. seconds: of computing with each bundle. bus: bytes a second."""

    seconds: list[float]
    bus: float


@dataclass
class Steps:
    """What each step took, in seconds. The other figures are of the last one."""

    seconds: list[float]
    compute_s: float
    bus_s: float
    reader_s: float
    spans: list[Span]
    known: Known | None


@contextmanager
def virtual_ram(total: int, free: int, pinned: partial[int], clock: Clock) -> Iterator[None]:
    """Let the engine see a machine of `total` bytes of RAM, of which pins have taken some, and the page cache too."""

    def seen() -> available.Available:
        return available.Available(max(0, free - pinned()), total, "the virtual machine's RAM", of_machine=True)

    def unused() -> int:
        assert clock.pages is not None
        return free - pinned() - clock.pages.nbytes

    with (
        patch.object(available, "unused_ram", unused),
        patch.object(available, "available_ram", seen),
        patch.object(available, "recent_ram", seen),
        patch.object(available, "total_ram", lambda: total),
    ):
        ram_pressure.ram_reserve.cache_clear()
        try:
            yield
        finally:
            ram_pressure.ram_reserve.cache_clear()


def run_engine(
    model: Model,
    machine: Machine,
    ram_gb: int,
    dtype: str,
    lora: bool,
    budget: int | None,
    spans: bool = False,
    orders_file: Path | None = None,
    most: int = MOST,
    known: Known | None = None,
    **policy: object,
) -> Steps:
    """Run `most` steps, or fewer once two take the same time.

    budget: bytes that weights may hold; None for all that they are. spans: keep the last step's. orders_file: see
    DynamicModel. known: what another process has measured.
    """
    clock = Clock(machine)
    backend = VirtualBackend(clock)
    ram = ram_for_weights(ram_gb)
    with ExitStack() as stack:
        stack.enter_context(virtual_math(clock))
        stack.enter_context(virtual_ram(ram_gb << 30, ram, partial(getattr, backend, "locked_bytes"), clock))
        int8 = Int8Layers(model.kind, "cuda") if dtype == "int8" else None
        limits = Policy(vram_bytes=budget, **policy)
        dynamic = DynamicModel(model, policy=limits, backend=backend, quantise=int8, orders_file=orders_file)
        stack.callback(dynamic.close)
        if known is not None:
            dynamic.remembered.recall_pace(Pace(dict(zip(dynamic.bundles, known.seconds, strict=True)), known.bus))
        model.run_on(clock, dtype)
        _prepare(dynamic, model, lora)
        clock.pages = PageCache(lambda: ram - backend.locked_bytes)
        for bundle in dynamic.bundles:  # the file was read from end to end once
            for param in bundle.params:
                clock.pages.read(id(param.source), tensor_bytes(param.source))
        seconds: list[float] = []
        while len(seconds) < most and not (len(seconds) >= FEWEST and abs(seconds[-1] / seconds[-2] - 1) < 1e-3):
            clock.spans = [] if spans else None
            mark = Mark.now(clock)
            dynamic(None)
            clock.wait_until(clock.main.at)  # the sampler looks at the result; transfers may go on
            seconds.append(clock.main.at - mark.at)
        compute = clock.sums.compute_s - mark.sums.compute_s
        bus = clock.buses[TO_DEVICE].seconds - mark.buses[TO_DEVICE]
        from_disk = clock.sums.bytes_from_disk - mark.sums.bytes_from_disk
        from_memory = clock.sums.bytes_read - mark.sums.bytes_read - from_disk
        reading = max(from_disk / machine.disk, from_memory / machine.memcpy_all)
        pace = dynamic.pace
        measured = pace and Known([pace.compute(bundle) for bundle in dynamic.bundles], pace.bus)
        return Steps(seconds, compute, bus, reading, clock.spans or [], measured)


def _prepare(dynamic: DynamicModel, model: Model, lora: bool) -> None:
    """Do what the loader does: say what the ops cast to, and attach the LoRA."""
    for bundle in dynamic.bundles:
        for param in bundle.params:
            if param.source.dtype == FP8:
                param.op_dtype = BF16
    if lora:
        blocks = {name for name, part in model.parts if hasattr(part, "order")}
        wide = {f"{name}.weight" for name, module in model.holders() if narrow(module)}
        keys = [key for key in dynamic.by_key if key in wide and any(key.startswith(f"{block}.") for block in blocks)]
        dynamic.set_patches({key: LowRankPatch() for key in keys})
