"""The caster of devices with their own memory: gathered transfers on offload streams, ahead of their use."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from ..device.backend import Backend, Event
from ..files.disk_map import SourceError
from ..gather import copy_into, interpret_gathered_like
from ..ledger import Ledger
from ..vbar.protocol import VBAR
from .bundle import Bundle
from .caster import Caster, Loan
from .pins import Pins
from .ring import Ring


class DeviceCaster(Caster):
    """prefetch: bundles to start ahead of their use. streams: offload streams to use, at most the device's."""

    def __init__(
        self, backend: Backend, vbar: VBAR, pins: Pins, ledger: Ledger, prefetch: int = 2, streams: int = 2
    ) -> None:
        super().__init__(backend, vbar, pins, ledger)
        count = min(streams, backend.streams)
        self.streams: list[Any] = [backend.stream() for _ in range(count)] or [None]
        self.prefetch = prefetch if count else 0
        self.turn = 0
        # A slot in use, the slots ahead, and a slot that drains.
        slots = self.prefetch + 2
        self.ring = Ring(backend.empty, slots, self.counters)
        # Host buffers that unpinned bundles are gathered in.
        self.staging = Ring(backend.host_empty, slots, self.counters)
        # A model may be dropped, by any thread, while transfers into its memory are under way. Without the wait they
        # would write into what the memory is used for next.
        self._settle = weakref.finalize(self, backend.settle)
        self._settle.atexit = False
        self.prefetched: dict[Bundle, Loan] = {}
        self.last_prefetched: Bundle | None = None
        self.write_backs: list[tuple[Event | None, torch.Tensor]] = []
        self.room, self.casts, self.staging_room = 1 << 62, 0, 1 << 62  # see set_room
        self._held = 0  # bytes of device memory that loans hold outside of VBAR and ring
        self.peak_buffer_bytes = 0

    # -- memory beside the VBAR

    def set_room(self, nbytes: int, casts: int, staging: int) -> None:
        self.room, self.casts, self.staging_room = nbytes, casts, staging
        self.make_way(0)

    @property
    def buffer_bytes(self) -> int:
        return self.ring.nbytes + self._outside()

    @property
    def staging_bytes(self) -> int:
        return self.staging.nbytes

    def _outside(self) -> int:
        """Return the bytes that are held outside of VBAR and ring."""
        return self._held + self.rows_bytes + sum(kept.numel() for _, kept in self.write_backs)

    def make_way(self, nbytes: int) -> None:
        if self.buffer_bytes + nbytes > self.room:
            self.ring.trim(self.room - nbytes - self._outside())
        if self.buffer_bytes + nbytes > self.room:
            self._finish_write_backs()
        if self.buffer_bytes + nbytes > self.room:
            self.cancel_prefetch()
            self.ring.trim(self.room - nbytes - self._outside())
        self.peak_buffer_bytes = max(self.peak_buffer_bytes, self.buffer_bytes + nbytes)

    def _finish_write_backs(self) -> None:
        while self.write_backs:
            event, _ = self.write_backs[0]
            if event is not None:
                event.synchronize()
            del self.write_backs[0]

    def _has_room_ahead(self, loan: Loan) -> bool:
        """Say whether a bundle may come ahead of its use, beside those that are on their way."""
        bundle = loan.bundle
        if loan.signature is not None and (bundle.pin_is_current or bundle.source_is_final):
            return True
        # What the bundle in use was cast to is gone before the next one is cast.
        others = self.ring.taken_bytes + max(self._outside(), self.casts)
        return others + bundle.transfer_bytes <= self.room

    def free_buffers(self) -> int:
        with self.lock:
            before = self.buffer_bytes
            self.cancel_prefetch()
            self._finish_write_backs()
            self.ring.clear()
            self.staging.clear()
            return before - self.buffer_bytes

    # -- a loan's way

    def request(self, bundle: Bundle) -> Loan:
        if self.write_backs:
            self.write_backs = [(event, kept) for event, kept in self.write_backs if not _done(event)]
        if self.prefetched:
            loan = self.prefetched.pop(bundle, None)
            if loan is not None:
                return loan
            self.cancel_prefetch()  # the order is not what it was
        self.last_prefetched = None
        return super().request(bundle)

    def request_aside(self, bundle: Bundle) -> Loan:
        started = self.prefetched.pop(bundle, None)
        return started if started is not None else super().request(bundle)

    def start(self, loan: Loan) -> None:
        bundle = loan.bundle
        bundle.check_present()
        stream = self.streams[self.turn]
        self.turn = (self.turn + 1) % len(self.streams)
        pin = self.pins.get(bundle)
        current = pin is not None and pin.version == bundle.version
        # Where the budget has no room for the source beside the final form, the host casts.
        host_casts = not current and self._must_cast_on_host(loan)
        loan.brings_final = current or bundle.source_is_final or host_casts
        nbytes = bundle.nbytes if loan.brings_final else bundle.source_bytes
        to_vbar = loan.brings_final and loan.signature is not None
        if to_vbar:
            loan.target = self.vbar.tensor(bundle.vbar_slice)[:nbytes]
        else:
            casts = max(0, bundle.offload_cost() - nbytes)
            loan.slot = self.ring.take(nbytes, self.room - self._outside() - casts)
            if loan.slot is None:  # nested modules hold every slot
                loan.target = self._hold(loan, nbytes)
            else:
                loan.target = loan.slot.buffer[:nbytes]
            self.peak_buffer_bytes = max(self.peak_buffer_bytes, self.buffer_bytes)
        if loan.slot is None or loan.slot.fresh:
            # Fresh memory may still be read by kernels queued on the main stream. Without this wait the copy would
            # overwrite their input and the image would be wrong.
            self.backend.wait(self.backend.record(None), stream)
        if loan.slot is not None:
            loan.slot.fresh = False
        if host_casts:
            pin = None
        elif not current and (pin is None or pin.version is not None):
            pin = self.pins.take(bundle, bundle.source_bytes, None) if not self._worth_writing_back(bundle) else None
            if pin is not None:
                try:
                    self._gather(bundle, pin.buffer)
                except BaseException:
                    self.pins.drop(bundle)
                    raise
        if pin is not None:
            if pin.ready is not None:
                # Without this wait the copy would read a pin that a write-back is still filling.
                self.backend.wait(pin.ready, stream)
            self.backend.copy(loan.target, pin.buffer[:nbytes], stream)
            loan.event = pin.busy = self.backend.record(stream)
        else:
            self._stage(bundle, loan, stream)
        if loan.signature is None:
            self.counters.bytes_streamed += nbytes
        else:
            self.counters.bytes_loaded += nbytes

    def _must_cast_on_host(self, loan: Loan) -> bool:
        bundle = loan.bundle
        if loan.signature is None or bundle.source_is_final or not bundle.only_cast:
            return False
        return self.ring.taken_bytes + self._outside() + bundle.source_bytes > self.room

    def _hold(self, loan: Loan, nbytes: int) -> torch.Tensor:
        """Allocate device memory that the loan gives back when it ends."""
        memory = self.backend.empty(nbytes)
        loan.held += nbytes
        self._held += nbytes
        return memory

    def _gather(self, bundle: Bundle, buffer: torch.Tensor, final: bool = False) -> None:
        """Copy the source into a host buffer. final: in the final form, which is a cast of the source."""
        bundle.check_files()
        form = bundle.final if final else bundle.source
        for view, tensor in zip(interpret_gathered_like(form, buffer), bundle.source, strict=True):
            assert view is not None
            copy_into(view, tensor)
        bundle.check_files()  # what was written meanwhile must not be kept
        bundle.drop_pages()

    def _stage(self, bundle: Bundle, loan: Loan, stream: Any) -> None:
        assert loan.target is not None
        nbytes = loan.target.numel()
        staging = self.staging.take(nbytes, self.staging_room)
        buffer = torch.empty(nbytes, dtype=torch.uint8) if staging is None else staging.buffer
        try:
            self._gather(bundle, buffer, final=loan.brings_final and not bundle.source_is_final)
            self.backend.copy(loan.target, buffer[:nbytes], stream)
            loan.event = self.backend.record(stream)
        finally:
            if staging is None:
                loan.keep = buffer
            else:
                self.staging.give(staging, loan.event)

    def complete(self, loan: Loan) -> Sequence[torch.Tensor]:
        bundle = loan.bundle
        assert loan.target is not None
        # Without this wait the main stream would compute with what lay in the target before the transfer.
        self.backend.wait(loan.event, None)
        if loan.brings_final:
            views: list[torch.Tensor] = interpret_gathered_like(bundle.final, loan.target)  # type: ignore[assignment]
        else:
            source: list[torch.Tensor] = interpret_gathered_like(bundle.source, loan.target)  # type: ignore[assignment]
            resident = loan.signature is not None
            casts = bundle.offload_cost() - bundle.source_bytes
            self.make_way(casts - bundle.nbytes if resident else casts)
            memory = self.vbar.tensor(bundle.vbar_slice) if resident else self._hold(loan, bundle.nbytes)
            memory = memory[: bundle.nbytes]
            views = self.make_final(bundle, source, memory)
            if not resident:
                loan.keep = memory
                self._write_back(bundle, memory)
            del source
            loan.target = None  # or the loan would hold the buffer for as long as its op runs
            self._free_slot(loan)
        if loan.signature is not None:
            self.keep_resident(loan, views)
        return views

    @staticmethod
    def _worth_writing_back(bundle: Bundle) -> bool:
        """Say whether a pin of the final form saves arithmetic (of patches, of quantisation) or bytes.

        A mere upcast is cheaper to repeat than to transfer.
        """
        return bundle.worth_keeping or bundle.nbytes < bundle.source_bytes

    def _write_back(self, bundle: Bundle, memory: torch.Tensor) -> None:
        if not self._worth_writing_back(bundle):
            return
        pin = self.pins.take(bundle, bundle.nbytes, bundle.version)
        if pin is None:
            return
        stream = self.streams[self.turn]
        try:
            # The main stream makes the final form. Without this wait the pin would get what lay there before.
            self.backend.wait(self.backend.record(None), stream)
            self.backend.copy(pin.buffer, memory, stream)
            pin.ready = self.backend.record(stream)
        except BaseException:
            self.backend.synchronize()
            self.pins.drop(bundle)  # its version would pass what lies there off as the final form
            raise
        # Kept until the stream has read it. Else the allocator would hand the memory out and the pin would get the
        # numbers of another tensor.
        self.write_backs.append((pin.ready, memory))
        self.counters.write_backs += 1
        self.counters.bytes_written_back += bundle.nbytes

    def _free_slot(self, loan: Loan) -> None:
        slot, loan.slot = loan.slot, None
        if slot is not None:
            done = None
            try:
                done = self.backend.record(None)
            finally:
                self.ring.give(slot, done)

    def finish(self, loan: Loan) -> None:
        try:
            if loan.views is None and loan.event is not None:
                # No kernel waited for this transfer. Its target would be used again while the copy still writes there.
                loan.event.synchronize()
        finally:
            if loan.held:
                self._held -= loan.held
                loan.held = 0
            self._free_slot(loan)

    # -- ahead of the use

    def prefetch_after(self, bundle: Bundle) -> None:
        if not self.prefetch:
            return
        last = self.last_prefetched if self.last_prefetched is not None else bundle
        while len(self.prefetched) < self.prefetch:
            following = last.successor
            if following is None or following is bundle or following in self.prefetched or following.loan is not None:
                break
            loan = self.ask(following)
            if loan.views is None and not self._has_room_ahead(loan):
                self.counters.misses -= loan.signature is None  # it will be asked for again
                self.counters.faults -= loan.signature is not None
                self.end(loan)
                break
            try:
                if loan.views is None:
                    self.begin(loan)
            except (RuntimeError, MemoryError, SourceError):
                break  # the request for this bundle itself will raise it
            self.prefetched[following] = loan
            if loan.views is None:
                self.counters.prefetched += 1
            last = following
        self.last_prefetched = last if self.prefetched else None

    def cancel_prefetch(self) -> None:
        with self.lock:
            while self.prefetched:
                self.end(self.prefetched.popitem()[1])
            self.last_prefetched = None

    def close(self) -> None:
        self._settle.detach()
        self.backend.synchronize()
        self.free_buffers()


def _done(event: Event | None) -> bool:
    return event is None or event.query()
