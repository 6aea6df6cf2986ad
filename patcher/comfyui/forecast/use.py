"""Foresees one use of a model that nobody has loaded: what stays, what it brings, and the most memory that it takes."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import comfy.model_management

from ....ops.vbar import cap
from ....ops.vbar.aimdo import PAGE, serves
from ...dynamic_model import DynamicModel, models
from ...forecast import Forecast, Place, foresee
from .. import sizes
from ..model_state import state_of
from . import learnt


def foresee_use(
    patcher: Any,
    size: str,
    computation: int,
    expected: int,
    all_models: int | None,
    unknown: list[str],
    idle: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Foresee a use of a sketch, ready for JSON.

    size: of what it computes, as `sizes` names it. computation: what that takes by ComfyUI's estimate, in bytes.
    expected: what ComfyUI asks for beside the weights. all_models: the cap over all models, in bytes. unknown: what
    the sketch could not know. idle: beginnings of the names of layers that it does not use.
    """
    model: DynamicModel = patcher.dynamic
    learnt.recall_pace(model, size)
    known = learnt.peaks_of(model, size)
    place = place_of(model, all_models)
    # Prompts are of any length, so the plan of a text encoder does not go by those that were.
    shown = known.shown(expected) if size != sizes.TEXT else None
    told = foresee(model, place, computation, expected, lambda bundle: bundle.name.startswith(idle), shown)
    beside = known.beside_in(told.resident, told.streamed)
    if beside is not None:
        told = replace(told, computation=beside)
    seen = known.of(told.resident, told.streamed, learnt.budget_of(model))
    took, stalls = learnt.waits_of(model, size, (told.resident, told.streamed))
    peak, total = told.peak if seen is None else seen, model.backend.memory()[1]
    return {
        **{name: value for name, value in asdict(told).items() if name != "state"},
        "state": told.state.value,
        "peak": peak,
        "at_least": told.at_least,
        **_steps(told, took, stalls),
        "learnt": known.beside is not None,
        "seen": seen is not None,
        "fits": peak <= total,
        "device": str(model.device),
        "device_total": total,
        "name": type(patcher.model).__name__,
        "format": model.number_format,
        "size": size,
        "key": learnt.key_of(model, size),
        "unknown": unknown,
    }


def _steps(told: Forecast, took: learnt.Waits | None, stalls: float) -> dict[str, float | None]:
    """Say how long a step takes, and of that how long it waits: as one of this plan did, or as others let expect."""
    if took is not None:
        return {"seconds": took.seconds, "waits": took.waited}
    if told.step is None or told.compute is None:
        return {"seconds": None, "waits": None}
    return {"seconds": told.step + stalls, "waits": max(0.0, told.step - told.compute) + stalls}


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
