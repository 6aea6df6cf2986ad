"""Describes each model that is alive, Spillway's and ComfyUI's, for reports."""

from __future__ import annotations

import weakref
from typing import Any

import comfy.model_management

from ..cache.comfyui.models import model_bytes
from ..patcher import dynamic_model as dynamic
from ..patcher.comfyui.loading.load import is_ours
from ..patcher.comfyui.model_state import state_of
from ..patcher.comfyui.run_record import last_run

DECISIONS = 5

# Looking at every weight takes a millisecond, and the answer stays.
_descriptions: weakref.WeakKeyDictionary[dynamic.DynamicModel, dict[str, str]] = weakref.WeakKeyDictionary()


def model_records() -> list[dict[str, Any]]:
    """Make a record for each dynamic model that is alive, and for each of ComfyUI's that is loaded."""
    records = [_ours(model) for model in list(dynamic.models)]
    for loaded in list(comfy.model_management.current_loaded_models):
        patcher = loaded.model
        if patcher is not None and not is_ours(patcher):
            records.append(
                {
                    "name": type(patcher.model).__name__,
                    "by": "ComfyUI",
                    "device": str(patcher.load_device),
                    "total": int(patcher.model_size()),
                    "bytes": model_bytes(patcher),
                    "decisions": [],
                    "residency": [],
                }
            )
    return sorted(records, key=lambda record: -record["total"])


def notices() -> list[dict[str, Any]]:
    """List what a user should hear of, the newest last. The numbers grow over the life of the process."""
    told = [
        {"number": number, "from": model.ledger.name, "text": text}
        for model in list(dynamic.models)
        for number, text in list(model.ledger.notices)
    ]
    return sorted(told, key=lambda notice: notice["number"])


def _ours(model: dynamic.DynamicModel) -> dict[str, Any]:
    mapped = sum(bundle.source_bytes for bundle in model.bundles if next(iter(bundle.maps()), None) is not None)
    on_device = model.device_bytes
    in_place = model.backend.in_place
    if model not in _descriptions:
        _descriptions[model] = {"file": model.file_name, "format": model.number_format}
    return {
        "id": model.ledger.number,
        "name": model.ledger.name,
        "by": "Spillway",
        "device": str(model.device),
        "total": model.total_bytes,
        # On a CPU, resident weights are pages of RAM.
        "bytes": {
            "vram": 0 if in_place else on_device,
            "pins": model.pinned_bytes + model.staging_bytes,
            "ram": on_device if in_place else 0,
            "disk": mapped,
        },
        "own_ram": model.resident_ram_bytes,
        **_descriptions[model],
        "vbar": model.vbar_kind,
        "decisions": list(model.ledger.decisions)[-DECISIONS:],
        "residency": [[name, nbytes, resident] for name, nbytes, resident in model.bundle_report()],
        "places": model.places(),
        **_node(model),
        **_policy(model),
        **_steps(model),
    }


def _node(model: dynamic.DynamicModel) -> dict[str, Any]:
    """Say which node loaded the model, and whether the running node uses it."""
    state, run = state_of(model.module), last_run()
    loaded_by = state.loaded_by if state is not None else None
    running = run.running if run is not None else None
    return {
        "node": None if loaded_by is None else {"id": loaded_by[0], "kind": loaded_by[1]},
        "samples": state is not None and state.samples,
        "running": running is not None and model.last_used >= running[2],
    }


def _policy(model: dynamic.DynamicModel) -> dict[str, Any]:
    state = state_of(model.module)
    policy = state.heed(model.policy) if state is not None else model.policy
    return {
        "keep": policy.keep,
        "limit": policy.vram_bytes,
        "chosen": sorted(state.chosen) if state is not None else [],
        "kept_free": 0 if model.backend.in_place else model.kept_free,
    }


def _steps(model: dynamic.DynamicModel) -> dict[str, Any]:
    """Say what a step takes: bytes that it brings, seconds, and of those the computation and the bus, where known."""
    step, pace = model.ledger.step, model.pace
    return {
        "steps": model.ledger.counters.steps,
        "step": {
            "streamed": step.streamed,
            "seconds": step.seconds,
            "compute": sum(pace.seconds.values()) if pace is not None else None,
            "bus": pace.bus if pace is not None else None,
        },
    }
