"""What the check of a device found, and what the engine does without on that device."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

from ...ops.device.backend import Backend
from ...ops.device.careful_backend import CarefulBackend
from ...ops.int8 import linear
from ...ops.ledger import Ledger

# The checks, in their order. What is used instead of a thing that failed.
COPIES, PINNED, STREAMS, VBAR, INT8, FP8 = "copies", "pinned memory", "side streams", "comfy-aimdo", "INT8", "FP8"
INSTEAD = {
    COPIES: "nothing that it computes can be trusted. Look for faults in the system's log",
    PINNED: "pageable memory is used, which transfers more slowly",
    STREAMS: "transfers are synchronous and take longer",
    VBAR: "models use a software VBAR",
    INT8: "weights in INT8 are dequantised and multiplied in floating point",
    FP8: "weights in FP8 are dequantised and multiplied in floating point",
}


@dataclass
class Verdict:
    """Says which checks of a device failed, and how. not_run: checks that said nothing this time, and why."""

    device: str = ""
    failed: dict[str, str] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def trusts(self, check: str) -> bool:
        """Say whether a thing may be used. Where plain copies fail, nothing may."""
        return check not in self.failed and COPIES not in self.failed

    def step_down(self, backend: Backend, ledger: Ledger) -> None:
        """Have a model do without what failed on its device, and say so in its ledger. The VBAR is the caller's."""
        if not self.failed:
            return
        if isinstance(backend, CarefulBackend):
            backend.pageable = backend.pageable or not self.trusts(PINNED)
            backend.synchronous = backend.synchronous or not self.trusts(STREAMS)
        self.distrust_products(backend.device)
        for check, words in self.failed.items():
            ledger.decide_once(self.in_words(check, words), level=logging.WARNING)

    def distrust_products(self, device: torch.device) -> None:
        """Have weights in INT8 dequantised where their products are wrong on the device."""
        if not self.trusts(INT8):
            linear.distrust(device)

    def in_words(self, check: str, words: str) -> str:
        """Say what failed and what is done instead."""
        return f"{self.device} failed the check before its first use ({words}): {INSTEAD[check]}. Please report it."
