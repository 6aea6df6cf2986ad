"""Learns from each sampling that ends what it took, and tells the record of the run."""

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
    """Note what the model that a node sampled has shown -> figures for the record. None for other nodes."""
    sampled = [(m, s) for m in list(models) if m.last_used >= began and (s := _sampling(m)) is not None]
    if not sampled:
        return None
    model, state = max(sampled, key=lambda pair: pair[0].last_used)
    assert state.latent is not None
    step, residency, peak = model.ledger.step, model.residency, _peak(model, peaks)
    stays = [b for b in residency.addresses if residency.is_resident(b)] if residency is not None else []
    resident = sum(bundle.nbytes for bundle in stays)
    if peak is not None and residency is not None:
        buffers = max(residency.held(residency.plan, stays) - model.resident_bytes, residency.caster.peak_buffer_bytes)
        weights = model.resident_bytes + model.placed_bytes + buffers
        learnt.note_peak(model, state.latent, peak, weights, (resident, step.last))
    learnt.note_pace(model, state.latent)
    return {
        "key": learnt.key_of(model, state.latent),
        "name": model.ledger.name,
        "latent": list(state.latent),
        "streamed": step.last,
        "seconds": step.seconds,
        "resident": resident,
        "peak": peak,
    }


def _sampling(model: DynamicModel) -> ModelState | None:
    state = state_of(model.module)
    return state if state is not None and state.samples and state.latent is not None else None


def _peak(model: DynamicModel, peaks: dict[str, int]) -> int | None:
    """Count the bytes of the peak that no other model held. None on a device that tells no peaks."""
    name = str(model.device)
    if name not in peaks:
        return None
    others = sum(other.device_bytes for other in list(models) if other is not model and str(other.device) == name)
    return peaks[name] - others
