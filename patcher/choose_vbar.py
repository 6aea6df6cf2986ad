"""Which VBAR holds a model's weights, and why."""

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
    """Make the VBAR for `nbytes` of bundles. failure: why comfy-aimdo's, which this model had, is not to be used again.

    Raises RuntimeError where the policy forces one that cannot be had.
    """
    if failure is not None:
        served, reason = False, f"comfy-aimdo's failed ({failure})"
    else:
        served, reason = serves(backend, may_init)
        if policy.vbar == "aimdo" and not served:
            raise RuntimeError(f"the policy asks for comfy-aimdo's VBAR, but {reason}. Choose 'auto' or 'software'.")
    if served and policy.vbar != "software":
        # Addresses cost nothing: room for the alignment of every bundle and a page more.
        vbar = _reserve(backend, nbytes + PAGE, ledger)
        if vbar is not None:
            ledger.decide_once(f"comfy-aimdo VBAR of {in_words(vbar.capacity)}: {reason}", level=logging.INFO)
            return vbar
        reason = "comfy-aimdo's could not be made"
    why = "the policy asks for it" if policy.vbar == "software" else reason
    ledger.decide_once(f"software VBAR: {why}; {in_words(headroom)} headroom", level=logging.INFO)
    return SoftwareVBAR(backend, headroom)


def _reserve(backend: Backend, nbytes: int, ledger: Ledger) -> AimdoVBAR | None:
    """comfy-aimdo's VBAR; None where it cannot be had in two attempts."""
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
