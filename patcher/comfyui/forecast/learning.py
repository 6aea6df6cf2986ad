"""Learns from each node that ends what its model took, and tells the record of the run."""

from __future__ import annotations

from typing import Any

from ....ops.never_raises import never_raises
from ...dynamic_model import DynamicModel, models
from .. import run_record
from ..model_state import ModelState, state_of
from . import learnt


def install() -> None:
    """Learn from every node that ends from now on."""
    run_record.listener = never_raises("learning from a run", lambda *_: None)(node_ended)


def node_ended(peaks: dict[str, int], began: float) -> dict[str, Any] | None:
    """Note what the model that a node used has shown -> figures for the record. None for nodes that used none.

    Of several models it is the one that the node sampled, or else the last.
    """
    used = [(m, s) for m in list(models) if m.last_used >= began and (s := state_of(m.module)) is not None and s.size]
    if not used:
        return None
    model, state = max(used, key=lambda pair: (pair[1].samples, pair[0].last_used))
    size = str(state.size)
    step, residency, peak = model.ledger.step, model.residency, _peak(model, peaks)
    stays = [b for b in residency.addresses if residency.is_resident(b)] if residency is not None else []
    resident, streamed = sum(bundle.nbytes for bundle in stays), _streamed(model, state)
    if peak is not None and residency is not None:
        held = residency.held(residency.plan, stays)
        weights = max(held, residency.caster.recent_bytes) + model.placed_bytes
        learnt.note_peak(model, size, peak, weights, (resident, streamed))
    learnt.note_pace(model, size)
    if state.samples:
        learnt.note_waits(model, size, (resident, streamed))
    return {
        "key": learnt.key_of(model, size),
        "name": model.ledger.name,
        "size": size,
        "streamed": streamed,
        "seconds": step.seconds,
        "waited": learnt.waited(model) if state.samples else None,
        "stalled": step.stalled,
        "resident": resident,
        "peak": peak,
    }


def _streamed(model: DynamicModel, state: ModelState) -> int:
    """Count what a step brings once it has settled. A text encoder and a VAE mostly run once: that is all there is."""
    return model.ledger.step.last if state.samples else model.ledger.mean_streamed()


def _peak(model: DynamicModel, peaks: dict[str, int]) -> int | None:
    """Count the bytes of the peak that no other model held. None on a device that tells no peaks."""
    name = str(model.device)
    if name not in peaks:
        return None
    others = sum(other.device_bytes for other in list(models) if other is not model and str(other.device) == name)
    return peaks[name] - others
