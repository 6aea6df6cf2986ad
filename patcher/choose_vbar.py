"""Chooses the VBAR that holds a model's weights, and says why."""

from __future__ import annotations

import logging

from ..ops.device.backend import Backend, DeviceError
from ..ops.ledger import Ledger, in_words
from ..ops.vbar.aimdo import PAGE, AimdoVBAR, serves
from ..ops.vbar.protocol import VBAR
from ..ops.vbar.software import SoftwareVBAR
from .policy import Policy


def choose_vbar(
    backend: Backend,
    policy: Policy,
    headroom: int,
    nbytes: int,
    ledger: Ledger,
    may_init: bool,
    failure: str | None = None,
) -> VBAR:
    """Make the VBAR for `nbytes` bytes of bundles, their alignment included.

    headroom: bytes to keep free on the device. may_init: initialise comfy-aimdo where nobody has. failure: why this
    model has given comfy-aimdo's VBAR up. Raises RuntimeError where the policy forces a VBAR that cannot be had,
    DeviceError where the device fails.
    """
    if failure is not None:
        served, reason = False, f"comfy-aimdo's failed ({failure})"
    else:
        served, reason = serves(backend, may_init)
        if policy.vbar == "aimdo" and not served:
            raise RuntimeError(f"the policy asks for comfy-aimdo's VBAR, but {reason}. Choose 'auto' or 'software'.")
    if served and policy.vbar != "software":
        # Ask for a page more than the bundles need, as addresses cost nothing.
        vbar = _reserve(backend, nbytes + PAGE, ledger)
        if vbar is not None:
            ledger.decide_once(f"comfy-aimdo VBAR of {in_words(vbar.capacity)}: {reason}", level=logging.INFO)
            return vbar
        reason = "comfy-aimdo's could not be made"
    why = "the policy asks for it" if policy.vbar == "software" else reason
    ledger.decide_once(f"software VBAR: {why}; {in_words(headroom)} headroom", level=logging.INFO)
    return SoftwareVBAR(backend, headroom)


def _reserve(backend: Backend, nbytes: int, ledger: Ledger) -> AimdoVBAR | None:
    """Make comfy-aimdo's VBAR. Returns None after two failed attempts. Raises DeviceError where the device fails."""
    errors = (MemoryError, RuntimeError)
    try:
        return backend.retry_once(AimdoVBAR, backend, nbytes, ledger, errors=errors)
    except DeviceError:
        raise
    except errors as error:
        ledger.decide(
            f"comfy-aimdo could not reserve {in_words(nbytes)} of addresses ({error}): this model uses a software "
            "VBAR. Load it again to go back; other models are not affected.",
            level=logging.WARNING,
        )
        return None
