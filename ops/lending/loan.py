"""A loan: one use of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..device.backend import Event
from ..device.readers import Job
from .arena import Extent
from .bundle import Bundle


class Loan:
    """One use of a bundle, from the request for its memory to the end of the op."""

    # Defaults of the class: every layer call creates a loan, and most loans are of resident bundles and set none.
    views: Sequence[torch.Tensor] | None = None  # set: ready to use
    target: torch.Tensor | None = None  # where the transfer goes
    extent: Extent | None = None  # of the arena, where the target lies there
    after: Sequence[Event | None] = ()  # what the transfer into the target must wait for
    reading: Any = None  # brings the bytes into host memory, where no pin holds them
    job: Job | None = None  # starts the transfer once they are there
    event: Event | None = None  # after the transfer, once that is started
    brings_final = False  # the transfer brings the final form
    host_casts = False  # the host makes the final form
    scratch: torch.Tensor | None = None  # where a host makes the final form for this use alone
    keep: object | None = None  # memory that must outlive a transfer
    held = 0  # bytes of device memory that the loan holds outside of VBAR and arena
    started = False  # bytes had to be brought

    def __init__(self, bundle: Bundle, signature: Any) -> None:
        self.bundle = bundle
        self.signature = signature  # not None: the slice is pinned in the VBAR

    @property
    def goes_to_its_slice(self) -> bool:
        """Say whether what is brought goes straight to where it stays."""
        return self.signature is not None and self.extent is None

    @property
    def has_come(self) -> bool:
        """Say whether the transfer is done."""
        return self.event is not None and self.event.query()

    def cast_bytes(self) -> int:
        """Return the bytes that making the final form takes beside the source and, where that stays, its slice."""
        return self.bundle.making_cost(resident=self.signature is not None)
