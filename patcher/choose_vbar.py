"""Which VBAR holds a model's weights, and why."""

from __future__ import annotations

import logging

from ..ops.aimdo_vbar import PAGE, AimdoVBAR, serves
from ..ops.backend import Backend
from ..ops.ledger import Ledger, in_words
from ..ops.software_vbar import SoftwareVBAR
from ..ops.vbar import VBAR
from .policy import Policy


def choose_vbar(backend: Backend, policy: Policy, headroom: int, nbytes: int, ledger: Ledger, may_init: bool) -> VBAR:
    """Make the VBAR for `nbytes` of bundles. Raises RuntimeError where the policy forces one that cannot be had."""
    served, reason = serves(backend, may_init)
    if policy.vbar == "aimdo" and not served:
        raise RuntimeError(f"the policy asks for comfy-aimdo's VBAR, but {reason}. Choose 'auto' or 'software'.")
    if served and policy.vbar != "software":
        # Addresses cost nothing: room for the alignment of every bundle and a page more.
        vbar = AimdoVBAR(backend, nbytes + PAGE)
        ledger.decide_once(f"comfy-aimdo VBAR of {in_words(vbar.capacity)}: {reason}", level=logging.INFO)
        return vbar
    why = "the policy asks for it" if policy.vbar == "software" else reason
    ledger.decide_once(f"software VBAR: {why}; {in_words(headroom)} headroom", level=logging.INFO)
    return SoftwareVBAR(backend, headroom)
