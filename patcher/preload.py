"""Bringing a dynamic model's weights onto its device before a forward asks for them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .dynamic_model import DynamicModel


def load_now(model: DynamicModel, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Fault every bundle that may stay and has room, without disturbing the order that a forward has traced.

    progress: told the bundles done and of how many. Returns the resident bytes.
    """
    model.prepare()
    caster = model.caster
    assert caster is not None
    caster.vbar.prioritize()  # an eviction closed its upper part
    with model.backend.current(), torch.no_grad():
        for done, bundle in enumerate(model.bundles):
            progress(done, len(model.bundles))
            with caster.lock:
                if bundle.piece is None or caster.vbar.fault(bundle.piece) is None:
                    continue
                caster.vbar.unpin(bundle.piece)
                loan = caster.take(bundle)
                try:
                    if loan.views is None:
                        caster.finish(loan)
                finally:
                    caster.release(loan)
    progress(len(model.bundles), len(model.bundles))
    return model.resident_bytes
