"""Bringing a dynamic model's weights, or quantising them, before a forward asks for them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .dynamic_model import DynamicModel

Progress = Callable[[int, int], None]


def _ignore(done: int, total: int) -> None: ...


def load_now(model: DynamicModel, progress: Progress = _ignore) -> int:
    """Bring every bundle that may stay and has room, without disturbing the order that a forward has traced.

    progress: told the bundles done and of how many. Returns the resident bytes.
    """
    caster = model.prepare().caster
    caster.vbar.prioritize()  # an eviction closed its upper part
    with model.backend.current(), torch.no_grad():
        for done, bundle in enumerate(model.bundles):
            progress(done, len(model.bundles))
            with caster.lock:
                if caster.has_room_for(bundle):
                    caster.bring(bundle)
    progress(len(model.bundles), len(model.bundles))
    return model.resident_bytes


def quantise_now(model: DynamicModel, progress: Progress = _ignore) -> int:
    """Make every INT8 weight that has somewhere to stay: on the device, or in a pin. Returns how many were made.

    The others are made at each use. At most one bundle is held beside those that stay. progress: told the bundles done
    and of how many, before each; what it raises ends this with everything in order.
    """
    caster = model.prepare().caster
    model.rebuild_if_resized()
    quantised, homeless = 0, False
    wanted = [bundle for bundle in model.bundles if any(param.int8 for param in bundle.params)]
    wanted = [bundle for bundle in wanted if not bundle.pin_is_current and bundle.views is None]
    with model.backend.current(), torch.no_grad():
        for done, bundle in enumerate(wanted):
            progress(done, len(wanted))
            with caster.lock:
                resides = caster.has_room_for(bundle)
                if homeless and not resides:
                    continue
                quantised += caster.bring(bundle)
                homeless = not resides and not bundle.pin_is_current
    if wanted:
        progress(len(wanted), len(wanted))
    return quantised
