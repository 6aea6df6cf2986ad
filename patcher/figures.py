"""The figures of a dynamic model: what it holds where, for reports, plans of others and tests."""

from __future__ import annotations

from ..ops.device.backend import Backend
from ..ops.lending.block import Block
from ..ops.lending.bundle import Bundle
from ..ops.lending.caster import Caster
from ..ops.lending.param import number_format
from ..ops.lending.pins import Pins
from .buffers import PlacedBuffers
from .layout import execution_order
from .load_plan import LoadPlan
from .remembered import Remembered
from .residency import Residency
from .step_time import Pace


class Figures:
    """Mixed into DynamicModel, whose fields these are. All sizes in bytes."""

    backend: Backend
    bundles: list[Bundle]
    residency: Residency | None
    pins: Pins | None
    _placed: PlacedBuffers
    _remembered: Remembered
    _peak: int
    _peak_held: int

    @property
    def placed_bytes(self) -> int:
        """Count the bytes of the module's buffers on the device, beside the VBAR. The budget counts them too."""
        return self._placed.nbytes

    @property
    def due_bytes(self) -> int:
        """Count the bytes of the module's buffers that are yet to be put on the device."""
        return self._placed.due

    @property
    def remembered(self) -> Remembered:
        """Give what the model knows from one residency to the next."""
        return self._remembered

    @property
    def total_bytes(self) -> int:
        """Count the bytes of all bundles in their final form, but for tables, which stay in their file."""
        return sum(bundle.nbytes for bundle in self.bundles if not bundle.by_rows)

    @property
    def resident_bytes(self) -> int:
        """Count the bytes of the VBAR that are mapped now."""
        return self.residency.vbar.loaded_size() if self.residency is not None else 0

    @property
    def peak_resident_bytes(self) -> int:
        """Count the most bytes of the VBAR that were ever mapped."""
        return max(self._peak, self.residency.peak_bytes if self.residency is not None else 0)

    @property
    def buffer_bytes(self) -> int:
        """Count the bytes of device memory that bundles on their way hold now, beside the VBAR."""
        return self.residency.caster.buffer_bytes if self.residency is not None else 0

    @property
    def device_bytes(self) -> int:
        """Count all bytes of device memory that the model holds now."""
        return self.resident_bytes + self.buffer_bytes + self.placed_bytes

    @property
    def peak_bytes(self) -> int:
        """Count the most bytes of device memory that weights, and bundles on their way, have held together."""
        now = self.residency.peak_held if self.residency is not None else 0
        return max(self._peak_held, now)

    @property
    def staging_bytes(self) -> int:
        """Count the bytes of host memory that bundles without a pin are gathered in."""
        return self.residency.caster.staging_bytes if self.residency is not None else 0

    @property
    def resident_ram_bytes(self) -> int:
        """Count the bytes of RAM that resident weights take beside their file's pages.

        0 on devices with memory of their own.
        """
        residency = self.residency
        if residency is None or not self.backend.in_place:
            return 0
        return sum(b.nbytes for b in self.bundles if not b.in_place and residency.is_resident(b))

    @property
    def pinned_bytes(self) -> int:
        """Count the bytes held in pins."""
        return self.pins.held if self.pins is not None else 0

    @property
    def caster(self) -> Caster | None:
        """Give the caster, which lends. None before the first forward."""
        return self.residency.caster if self.residency is not None else None

    @property
    def plan(self) -> LoadPlan | None:
        """Give the current or last plan of what stays on the device. None before the first forward."""
        return self._remembered.plan

    @property
    def vbar_kind(self) -> str:
        """Name the VBAR's kind: 'aimdo', 'software', or 'none' before the first forward."""
        return self.residency.vbar.kind if self.residency is not None else "none"

    @property
    def blocks(self) -> list[Block]:
        """List the bundles that are lent as whole blocks."""
        return [bundle for bundle in self.bundles if isinstance(bundle, Block)]

    @property
    def pace(self) -> Pace | None:
        """Give what a step's time is made of, by this process or an earlier one. None where no step was timed yet."""
        return self._remembered.pace

    @property
    def kept_free(self) -> int:
        """Count the bytes that the weights leave to the computation and to other programs."""
        return self.residency.kept_free if self.residency is not None else 0

    @property
    def file_name(self) -> str:
        """Name the file of the largest weight. Empty for a model that was made in memory."""
        largest = max(self.bundles, key=lambda bundle: bundle.source_bytes, default=None)
        maps = iter(()) if largest is None else iter(largest.maps())
        return next((disk_map.path.name for disk_map in maps), "")

    @property
    def number_format(self) -> str:
        """Name the format of most of the weights where they stay: 'bf16', 'fp8_e4m3fn', 'int8', 'Q4_K'."""
        sizes: dict[str, int] = {}
        for bundle in self.bundles:
            for param in bundle.params:
                name = number_format(param)
                sizes[name] = sizes.get(name, 0) + param.source.numel()
        return max(sizes, key=sizes.__getitem__, default="")

    def execution_order(self) -> list[Bundle]:
        """List the bundles in the order of the last step, or as registered before the first step."""
        first = self.residency.caster.first if self.residency is not None else None
        return execution_order(first, [bundle for bundle in self.bundles if not bundle.by_rows])

    def bundle_report(self) -> list[tuple[str, int, bool]]:
        """List (bundle name, bytes, resident) in execution order."""
        residency = self.residency
        return [
            (bundle.name, bundle.nbytes, residency is not None and residency.is_resident(bundle))
            for bundle in self.execution_order()
        ]

    def places(self) -> str:
        """Say where each bundle of `bundle_report` is: (r)esident, (p)inned in RAM, or (f) in its file alone."""
        residency, pins = self.residency, self.pins

        def place(bundle: Bundle) -> str:
            if residency is not None and residency.is_resident(bundle):
                return "r"
            return "p" if pins is not None and pins.holds(bundle) else "f"

        return "".join(map(place, self.execution_order()))
