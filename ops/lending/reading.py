"""Reads the source of a bundle into host memory, ahead of its use, and sends it from there once its target is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..device.backend import Backend, Event
from ..device.readers import Job, Readers
from ..files.disk_map import read_past_cache
from ..gather import copy_into, interpret_gathered_like
from .arena import Arena, Extent
from .bundle import Bundle
from .loan import Loan
from .pins import Pin, Pins

# Starts a transfer: (target, source, stream). Returns the event after it.
Copy = Callable[[torch.Tensor, torch.Tensor, Any], Event | None]


class Reading:
    """A bundle on its way into a pin, an extent of the staging memory, or memory that nobody counts.

    as_final: the host casts, so that what travels is the final form.
    """

    def __init__(
        self,
        readers: Readers,
        pins: Pins,
        staging: Arena,
        bundle: Bundle,
        pin: Pin | None,
        extent: Extent | None,
        as_final: bool,
    ) -> None:
        # Not the caster, whose memory would stay until the collector runs.
        self.pins, self.staging = pins, staging
        self.bundle, self.pin, self.extent, self.as_final = bundle, pin, extent, as_final
        self.nbytes = bundle.nbytes if as_final else bundle.source_bytes
        self.buffer: torch.Tensor | None = None
        self.is_sent = False
        self._fills = pin is not None  # holds the pin, which is yet to be filled
        self._sends = False  # holds the pin, for a transfer that is yet to be started
        # None once it is of no use. A job keeps what follows it, and with that the loan's memory.
        self.job: Job | None = readers.submit(self)

    # -- what a reader does

    def fill(self) -> None:
        bundle = self.bundle
        bundle.check_files()
        if self.pin is not None:
            self.buffer = self.pin.buffer
        elif self.extent is not None:
            for event in self.extent.after:
                # Without this wait a transfer that still reads what lies there would carry these bytes.
                event.synchronize()
            self.buffer = self.extent.view
        else:  # larger than all of the staging memory
            self.buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        form = bundle.final if self.as_final else bundle.source
        read = read_past_cache if self.pins.displace_pages() else None
        for view, tensor in zip(interpret_gathered_like(form, self.buffer), bundle.source, strict=True):
            assert view is not None
            copy_into(view, tensor, alone=True, read=read)
        bundle.check_files()  # what was written meanwhile must not be kept
        bundle.drop_pages(from_cache=self.pins.displace_pages())
        if self.pin is not None:
            self._fills = False
            self.pins.release(self.pin)

    def undo(self) -> None:
        if self._fills:
            assert self.pin is not None
            self._fills = False
            self.pins.give_up(self.bundle, self.pin)
        self._give_back(None)

    # -- what becomes of it

    def send_to(self, loan: Loan, backend: Backend, copy: Copy, stream: Any) -> bool:
        """Start the transfer to the loan's target as soon as all is read. Return False where the pin has gone."""
        if self.pin is not None:
            if not self.pins.hold(self.bundle, self.pin):
                return False
            self._sends = True
        assert self.job is not None
        loan.reading = self  # first, as the transfer may fail at once
        loan.job = self.job.then(partial(self._send, loan, backend, copy, stream))
        return True

    def _send(self, loan: Loan, backend: Backend, copy: Copy, stream: Any) -> None:
        buffer = self.buffer
        assert buffer is not None
        try:
            with backend.current():
                loan.event = _start(loan, backend, copy, buffer, stream)
        except BaseException:
            backend.synchronize()  # a transfer may have begun
            raise
        if self.pin is not None:
            self.pin.busy = loan.event
        elif self.extent is None:
            loan.keep = buffer  # until the transfer is done
        self.is_sent = True
        self.job = None
        self._give_back(loan.event)

    def keep(self) -> None:
        """Let it be sent to another loan than the one that has ended."""
        if self._sends:
            assert self.pin is not None
            self._sends = False
            self.pins.release(self.pin)

    def end(self) -> None:
        """Give back what it holds. Nothing is read or sent any more."""
        job, self.job = self.job, None
        if job is not None:
            job.cancel()
        self.undo()

    def _give_back(self, done: Event | None) -> None:
        self.keep()
        extent, self.extent = self.extent, None
        if extent is not None:
            if done is None:
                for event in extent.after:
                    # Nobody may have waited for it yet. Without this wait the next reader would write over what a
                    # transfer still reads.
                    event.synchronize()
            self.staging.give(extent, done)
        self.buffer = None


def send_pinned(pins: Pins, loan: Loan, backend: Backend, copy: Copy, stream: Any) -> bool:
    """Start the transfer of what the bundle's pin holds. Return False where it has none."""
    bundle = loan.bundle
    pin = pins.get(bundle) if not loan.host_casts and pins.holds(bundle) else None
    if pin is None or not pins.hold(bundle, pin):
        return False
    try:
        if pin.ready is not None:
            # Without this wait the copy would read a pin that a write-back is still filling.
            backend.wait(pin.ready, stream)
        loan.event = pin.busy = _start(loan, backend, copy, pin.buffer, stream)
    finally:
        pins.release(pin)
    return True


def _start(loan: Loan, backend: Backend, copy: Copy, buffer: torch.Tensor, stream: Any) -> Event | None:
    target = loan.target
    assert target is not None
    for event in loan.after:
        # Kernels on the main stream may still read what lies there. Without this wait the copy would overwrite their
        # input and the image would be wrong.
        backend.wait(event, stream)
    return copy(target, buffer[: target.numel()], stream)
