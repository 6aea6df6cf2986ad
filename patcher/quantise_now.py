"""Quantising a model's layers before its first forward, bundle by bundle."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .dynamic_model import DynamicModel


def quantise_now(model: DynamicModel, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Make every INT8 weight that has somewhere to stay: on the device, or in a pin. Returns how many were made.

    The others are made at each use. At most one bundle is held beside those that stay. progress: told the bundles done
    and of how many, before each; what it raises ends this with everything in order.
    """
    model.prepare()
    model.settle()
    caster = model.caster
    assert caster is not None
    vbar, made, homeless = caster.vbar, 0, False
    wanted = [bundle for bundle in model.bundles if any(param.int8 for param in bundle.params)]
    wanted = [bundle for bundle in wanted if not bundle.finished and bundle.views is None]
    with model.backend.current(), torch.no_grad():
        for done, bundle in enumerate(wanted):
            progress(done, len(wanted))
            with caster.lock:
                resides = bundle.piece is not None and vbar.fault(bundle.piece) is not None
                if resides:
                    vbar.unpin(bundle.piece)
                elif homeless:
                    continue
                loan = caster.take(bundle)
                try:
                    if loan.views is None:
                        caster.finish(loan)
                        made += 1
                finally:
                    caster.release(loan)
                homeless = not resides and not bundle.finished
    if wanted:
        progress(len(wanted), len(wanted))
    return made
