"""Brings a dynamic model's weights, or quantises them, before a forward asks for them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .dynamic_model import DynamicModel

Progress = Callable[[int, int], None]


def _ignore(done: int, total: int) -> None: ...


def load_now(model: DynamicModel, progress: Progress = _ignore) -> int:
    """Bring every bundle that may stay and has room, without disturbing the order that a forward has traced.

    progress(done, total): told counts of bundles. Returns the resident bytes.
    """
    caster = model.prepare().caster
    caster.vbar.prioritize()  # opens its upper part, which an eviction closed
    with model.backend.current(), torch.no_grad():
        for done, bundle in enumerate(model.bundles):
            progress(done, len(model.bundles))
            bundle.arrive()
            with caster.lock:
                if caster.has_room_for(bundle):
                    caster.bring(bundle)
    progress(len(model.bundles), len(model.bundles))
    return model.resident_bytes


def quantise_now(model: DynamicModel, progress: Progress = _ignore) -> int:
    """Make every quantised weight that can stay on the device or in a pin. Returns the number of bundles made.

    The others are made at each use. At most one bundle is held beside those that stay. progress(done, total): told
    counts of bundles before each bundle. An error that it raises passes, with the model in order.
    """
    caster = model.prepare().caster
    model.rebuild_if_resized()
    quantised, homeless = 0, False
    wanted = [bundle for bundle in model.bundles if any(param.quantisation for param in bundle.params)]
    wanted = [bundle for bundle in wanted if not bundle.pin_is_current and bundle.views is None]
    with model.backend.current(), torch.no_grad():
        for done, bundle in enumerate(wanted):
            progress(done, len(wanted))
            bundle.arrive()
            with caster.lock:
                resides = caster.has_room_for(bundle)
                if homeless and not resides:
                    continue
                quantised += caster.bring(bundle)
                homeless = not resides and not bundle.pin_is_current
    if wanted:
        progress(len(wanted), len(wanted))
    return quantised
