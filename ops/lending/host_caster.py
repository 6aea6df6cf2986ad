"""The caster of devices that compute on host memory: weights are used where they lie wherever their form allows it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..device.backend import Backend
from ..gather import interpret_gathered_like
from ..ledger import Ledger
from ..ram.apart import apart
from ..ram.scratch import Scratch, numbers
from ..vbar.protocol import VBAR
from .bundle import Bundle
from .caster import Caster
from .loan import Loan
from .pins import Pin, Pins


class HostCaster(Caster):
    """No streams. An unpatched weight of the right dtype is a view of its file's map: no copy.

    A bundle that is not resident is dropped from memory after its use, so the process holds the resident set and one
    bundle more. One that is merely cast gets memory to stay in at its second use: fresh memory takes longer to come by
    than the cast, and much is used once (a text encoder, a VAE, the model of a single step).
    advise: whether reading ahead is worth a system call (the file is not known to be cached).
    """

    advise = True

    def __init__(self, backend: Backend, vbar: VBAR, pins: Pins, ledger: Ledger) -> None:
        super().__init__(backend, vbar, pins, ledger)
        self.scratch = Scratch()

    def start(self, loan: Loan) -> None:
        bundle = loan.bundle
        bundle.check_present()
        if bundle.in_place:
            bundle.check_files()
            loan.views = bundle.where_it_lies()
            if loan.signature is not None:
                self.vbar.drop_tensor(bundle.vbar_slice)  # of a patch that is gone; the map's pages serve now
                self.keep_resident(loan, loan.views)
                self.counters.bytes_loaded += bundle.source_bytes
        elif loan.signature is None:
            pin = self._current_pin(bundle)
            if pin is not None:
                loan.views = interpret_gathered_like(bundle.final, pin.buffer)  # type: ignore[assignment]
        if loan.signature is None:
            self.counters.bytes_streamed += bundle.source_bytes

    def _current_pin(self, bundle: Bundle) -> Pin | None:
        """Return the bundle's pin where that pin holds the final form, else None."""
        pin = self.pins.get(bundle)
        return pin if pin is not None and pin.version == bundle.version else None

    def complete(self, loan: Loan) -> Sequence[torch.Tensor]:
        bundle = loan.bundle
        if loan.signature is None and self._is_made_anew(bundle):
            loan.scratch = self.scratch.take(bundle.nbytes)
            views = interpret_gathered_like(bundle.final, loan.scratch[: bundle.nbytes])
            self.fill(bundle, bundle.source, views)
            bundle.has_passed = True
        elif loan.signature is not None:
            memory, pin = self.vbar.tensor(bundle.vbar_slice)[: bundle.nbytes], self._current_pin(bundle)
            if pin is None:
                views = self.make_final(bundle, bundle.source, memory)
            else:
                memory.copy_(pin.buffer)
                views = interpret_gathered_like(bundle.final, memory)  # type: ignore[assignment]
            self.keep_resident(loan, views)
            self.counters.bytes_loaded += bundle.nbytes
        else:
            wanted = bundle.worth_keeping or bundle.offload_to in ("ram", "pin")
            pin = self.pins.take(bundle, bundle.nbytes, bundle.version) if wanted else None
            memory = pin.buffer if pin is not None else self.backend.empty(bundle.nbytes)
            try:
                views = self.make_final(bundle, bundle.source, memory)
            except BaseException:
                self.pins.drop(bundle)  # its version would pass what lies there off as the final form
                raise
            if pin is not None:
                self.counters.write_backs += 1
                self.counters.bytes_written_back += bundle.nbytes
        bundle.drop_pages()  # the final form lies elsewhere now
        return views

    def _is_made_anew(self, bundle: Bundle) -> bool:
        """Say whether the final form can be made for one use alone, in memory that is used again.

        Gradients keep what they need of the weights beyond the op.
        """
        return bundle.may_pass and not torch.is_grad_enabled() and self._current_pin(bundle) is None

    def ask(self, bundle: Bundle) -> Loan:
        if bundle.vbar_slice is None or bundle.has_passed or not self._is_made_anew(bundle):
            return super().ask(bundle)
        self.counters.faults += 1  # and nobody is evicted for what does not stay
        return Loan(bundle, None)

    def bring(self, bundle: Bundle) -> bool:
        bundle.has_passed = True  # it is to stay before anybody asks
        return super().bring(bundle)

    def make_final(self, bundle: Bundle, source: Sequence[torch.Tensor], memory: torch.Tensor) -> list[torch.Tensor]:
        return self.fill(bundle, source, apart(lambda: interpret_gathered_like(bundle.final, memory)))

    def fill(self, bundle: Bundle, source: Sequence[torch.Tensor], views: list[torch.Tensor]) -> list[torch.Tensor]:
        bundle.check_files()
        super().fill(bundle, source, views)
        bundle.check_files()  # what was written meanwhile must not be kept
        return views

    def finish(self, loan: Loan) -> None:
        block, loan.scratch = loan.scratch, None
        if block is not None:
            self.scratch.give_back(block)
        if loan.signature is None and loan.bundle.in_place and loan.bundle.offload_to not in ("ram", "pin"):
            loan.bundle.drop_pages()

    @property
    def has_buffers(self) -> bool:
        return self.scratch.idle_bytes() > 0

    def free_buffers(self) -> int:
        return self.scratch.release() + numbers.release()

    def prefetch_after(self, bundle: Bundle) -> None:
        following = bundle.successor
        if self.advise and following is not None and not self.vbar.resident(following.vbar_slice):
            following.read_ahead()

    def follow_trace(self, bundles: Sequence[Bundle]) -> None:
        """Stop reading ahead where the files fit into the free memory: they are in the page cache after one step."""
        super().follow_trace(bundles)
        self.scratch.release()  # what has passed comes to stay now, and has room for it
        maps = {disk_map for bundle in bundles for disk_map in bundle.maps()}
        self.advise = sum(disk_map.file_bytes for disk_map in maps) > self.backend.memory()[0] // 2
