"""Simulated devices that raise nothing and give wrong bytes."""

from __future__ import annotations

from kit.sim_device import POISON, SimDevice
from spillway.ops.vbar.software import SoftwareVBAR


class DropsCopies(SimDevice):
    """Every fifth copy on a side stream does not happen."""

    given = 0

    def copy(self, target, source, stream):
        if stream is not None:
            self.given += 1
            if self.given % 5 == 0:
                source = target
        super().copy(target, source, stream)


class ForgetsWaits(SimDevice):
    """The main stream does not wait for side streams."""

    keeps_memory = True

    def wait(self, event, stream):
        if stream is not None:
            super().wait(event, stream)


class StalePins(SimDevice):
    """What was first brought from a place in page-locked memory is what comes from there ever after."""

    def __init__(self, **options):
        super().__init__(**options)
        self.pages = []
        self.cached = {}

    def host_empty(self, nbytes):
        memory = super().host_empty(nbytes)
        self.pages.append(memory)  # no other memory has these addresses
        return memory

    def copy(self, target, source, stream):
        if any(source.untyped_storage().data_ptr() == page.untyped_storage().data_ptr() for page in self.pages):
            source = self.cached.setdefault((source.data_ptr(), source.numel()), source.clone())
        super().copy(target, source, stream)


class TornPins(SimDevice):
    """What comes back into page-locked memory lacks its first byte."""

    def host_empty(self, nbytes):
        memory = super().host_empty(nbytes)
        self.pages = [*getattr(self, "pages", ()), memory]
        return memory

    def copy(self, target, source, stream):
        if any(target.untyped_storage().data_ptr() == page.untyped_storage().data_ptr() for page in self.pages_now()):
            target, source = target[1:], source[1:]
        super().copy(target, source, stream)

    def pages_now(self):
        return getattr(self, "pages", ())


class BadMemory(SimDevice):
    """Plain copies change a byte."""

    def copy(self, target, source, stream):
        super().copy(target, source, stream)
        if stream is None and target.numel():
            target[-1] = 7


class Sound(SoftwareVBAR):
    """Behaves as comfy-aimdo's: an evicted slice has other bytes at the same addresses, and nobody is told."""

    kind = "aimdo"

    def __init__(self, backend, nbytes, ledger):
        super().__init__(backend)
        self.capacity = nbytes
        self.addresses = {}

    def alloc(self, nbytes, on_evict=None):
        return super().alloc(nbytes)

    def tensor(self, vbar_slice):
        if vbar_slice.memory is None:
            known = self.addresses.get(vbar_slice.offset)
            vbar_slice.memory = self.backend.empty(vbar_slice.nbytes) if known is None else known
            self.addresses[vbar_slice.offset] = vbar_slice.memory
        return vbar_slice.memory

    def _evict(self, vbar_slice):
        if vbar_slice.memory is not None:
            vbar_slice.memory.fill_(POISON)
        super()._evict(vbar_slice)


class AlwaysSame(Sound):
    """Says of every slice that its bytes are still there."""

    def same(self, signature, other):
        return other is not None


class LosesBytes(Sound):
    """A slice that is used again has other bytes, under the signature that it had."""

    def fault(self, vbar_slice):
        known = vbar_slice is not None and vbar_slice.serial
        signature = super().fault(vbar_slice)
        if known and signature is not None and vbar_slice.memory is not None:
            vbar_slice.memory.fill_(POISON)
        return signature
