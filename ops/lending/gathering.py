"""Gathers the source of a bundle in host memory and sends it on its way. Done by a reader."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ..device.backend import Backend, Event
from ..gather import copy_into, interpret_gathered_like
from .arena import Arena, Extent
from .loan import Loan
from .pins import Pin, Pins


class Sender(Protocol):
    """Whose memory bundles are gathered in, and whose device they go to."""

    backend: Backend
    pins: Pins
    staging: Arena

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> Event | None:
        """Start a transfer. Return the event after it."""


class Gathering:
    """Brings the source of the loan's bundle to the loan's target.

    as_final: the host casts, so that what travels is the final form. pins_source: what travels may stay pinned.
    """

    def __init__(self, caster: Sender, loan: Loan, stream: Any, as_final: bool, pins_source: bool) -> None:
        assert loan.target is not None
        self.caster, self.loan, self.stream = caster, loan, stream
        self.as_final, self.pins_source = as_final, pins_source
        self.target = loan.target
        self.nbytes = self.target.numel()
        self.pin: Pin | None = None
        self.extent: Extent | None = None
        self.buffer: torch.Tensor | None = None

    def take(self) -> None:
        """Take a pin where the source may stay in one, else staging memory, else memory that nobody counts."""
        caster, bundle = self.caster, self.loan.bundle
        if self.pins_source:
            self.pin = caster.pins.take(bundle, self.nbytes, None)
        elif bundle.worth_writing_back and not self.as_final:
            # The main stream fills the pin later, when there is no time to lock memory.
            caster.pins.make_room(bundle, bundle.nbytes)
        if self.pin is not None:
            self.buffer = self.pin.buffer
            return
        self.extent = caster.staging.wait_for(self.nbytes)
        if self.extent is not None:
            self.buffer = self.extent.view
        else:  # larger than all of the staging memory
            self.buffer = self.loan.keep = torch.empty(self.nbytes, dtype=torch.uint8)

    def fill(self) -> None:
        bundle = self.loan.bundle
        assert self.buffer is not None
        bundle.check_files()
        form = bundle.final if self.as_final else bundle.source
        for view, tensor in zip(interpret_gathered_like(form, self.buffer), bundle.source, strict=True):
            assert view is not None
            copy_into(view, tensor, alone=True)
        bundle.check_files()  # what was written meanwhile must not be kept
        bundle.drop_pages()

    def send(self) -> None:
        caster, loan = self.caster, self.loan
        assert self.buffer is not None
        with caster.backend.current():
            loan.event = caster.copy(self.target, self.buffer[: self.nbytes], self.stream)
        if self.pin is not None:
            self.pin.busy = loan.event
            caster.pins.filled(self.pin)
        self._give_back()

    def undo(self) -> None:
        try:
            if self.buffer is not None:
                self.caster.backend.synchronize()  # a transfer may have begun
        finally:
            if self.pin is not None:
                self.caster.pins.filled(self.pin)
                self.caster.pins.drop(self.loan.bundle)
            self._give_back()

    def _give_back(self) -> None:
        extent, self.extent = self.extent, None
        if extent is not None:
            self.caster.staging.give(extent, self.loan.event)
        self.buffer = None
