"""Chooses the caster of a device, and how much it may have on its way."""

from __future__ import annotations

from itertools import pairwise

from ..ops.device.backend import Backend
from ..ops.ledger import Ledger
from ..ops.lending.caster import Caster
from ..ops.lending.device_caster import DeviceCaster
from ..ops.lending.guess import OrderGuess
from ..ops.lending.host_caster import HostCaster
from ..ops.lending.pins import Pins
from ..ops.vbar.protocol import VBAR
from .load_plan import Window, bundles_ahead
from .policy import Policy
from .remembered import Remembered


def choose_caster(
    device: Backend, vbar: VBAR, pins: Pins, ledger: Ledger, policy: Policy, remembered: Remembered
) -> Caster:
    """Make the caster, which expects bundles in the order that is remembered, or in that of registration."""
    caster: Caster
    if device.in_place:
        caster = HostCaster(device, vbar, pins, ledger)
    else:
        caster = DeviceCaster(device, vbar, pins, ledger, policy.prefetch, policy.streams)
    order = [bundle for bundle in remembered.order if not bundle.by_rows]
    caster.traced = remembered.traced
    caster.guess = None if remembered.traced else OrderGuess(order)
    for bundle, following in pairwise([*order, *order[:1]] if remembered.foreseen else order):
        bundle.successor = following if remembered.foreseen else bundle.successor or following
    if remembered.foreseen:
        caster.trust(wholly=True)
        remembered.foreseen = False  # from now on what runs counts
    return caster


def fixed_window(policy: Policy, device: Backend) -> Window | None:
    """Return the rule of a policy that counts bundles, or of a device that brings one at a time; None for bytes."""
    if not min(policy.streams, device.streams):
        return bundles_ahead(0)
    return None if policy.prefetch is None else bundles_ahead(policy.prefetch + 1)  # and one that drains
