"""Foresees one sampling: what stays of the model, what each step brings, and the most memory that it takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import comfy.model_management

from ....ops.vbar import cap
from ....ops.vbar.aimdo import PAGE, serves
from ...dynamic_model import DynamicModel, models
from ...forecast import Place, foresee
from ..loads import needed_bytes
from ..model_state import state_of
from . import learnt
from .sketch import Loaded, sketch


@dataclass(frozen=True)
class Latent:
    """The size of what is sampled, in pixels and pictures. length: frames; 1 for a picture."""

    width: int
    height: int
    batch: int = 1
    length: int = 1

    def shape(self, patcher: Any) -> tuple[int, ...]:
        """Give the shape of the latent that a model samples for it."""
        form = patcher.get_model_object("latent_format")
        across = int(getattr(form, "spacial_downscale_ratio", 8) or 8)
        along = int(getattr(form, "temporal_downscale_ratio", 4) or 4)
        frames = () if form.latent_dimensions < 3 else ((self.length - 1) // along + 1,)
        return (self.batch, form.latent_channels, *frames, self.height // across, self.width // across)


def foresee_sampling(wanted: Loaded, latent: Latent, guided: bool, all_models: int | None) -> dict[str, Any]:
    """Foresee a sampling, ready for JSON. guided: with two conditions. all_models: the cap over all models, in bytes.

    Raises what the loaders raise.
    """
    patcher, unknown = sketch(wanted)
    model: DynamicModel = patcher.dynamic
    try:
        shape = latent.shape(patcher)
        learnt.recall_pace(model, shape)
        required = patcher.model.memory_required([2 * shape[0], *shape[1:]])
        known = learnt.peaks_of(model, shape)
        once = patcher.model.memory_required([shape[0] * (2 if guided else 1), *shape[1:]])
        computation = int(once) if known.beside is None else known.beside
        told = foresee(model, place_of(model, all_models), computation, needed_bytes(required, samples=True))
        seen = known.of(told.resident, told.streamed)
        peak = told.peak if seen is None else seen
        total = model.backend.memory()[1]
        return {
            **{name: value for name, value in asdict(told).items() if name != "state"},
            "state": told.state.value,
            "peak": peak,
            "at_least": told.at_least,
            "learnt": known.beside is not None,
            "seen": seen is not None,
            "fits": peak <= total,
            "device": str(model.device),
            "device_total": total,
            "name": type(patcher.model).__name__,
            "format": model.number_format,
            "latent": list(shape),
            "key": learnt.key_of(model, shape),
            "unknown": unknown,
        }
    finally:
        patcher.state.close()


def place_of(model: DynamicModel, all_models: int | None) -> Place:
    """Say what the device has for a model, once all that may give way has done so."""
    backend, policy = model.backend, model.policy
    free, _ = backend.memory()
    others = [other for other in list(models) if other.device == model.device and other.policy.keep != "always"]
    theirs = [
        loaded.model
        for loaded in list(comfy.model_management.current_loaded_models)
        if loaded.model is not None and loaded.device == model.device and state_of(loaded.model.model) is None
    ]
    gives_way = sum(other.device_bytes for other in others) + sum(int(one.loaded_size()) for one in theirs)
    follows = policy.vbar != "software" and serves(backend)[0]
    caps = [one for one in (all_models, cap.cap_of(model.device)) if one is not None]
    return Place(
        reach=free + (0 if backend.in_place else gives_way),
        unit=PAGE if follows else 1,
        follows=follows,
        capped=min(caps, default=None),
        bus=learnt.bus_of(model),
    )
