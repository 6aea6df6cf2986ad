"""The memory report: models, output cache and decisions, for the node and for /spillway/memory."""

from __future__ import annotations

from typing import Any

import comfy.model_management

from ..cache.comfyui import cache as comfy_cache
from ..cache.comfyui.models import model_bytes
from ..cache.snapshot import MemorySnapshot
from ..ops.ledger import in_words
from ..patcher import dynamic_model as dynamic
from ..patcher.comfyui.loading.load import is_ours

DECISIONS = 5


def memory_report() -> dict[str, Any]:
    """Plain data, all sizes in bytes: memory, models (Spillway's and the core's), cache."""
    models = model_records()
    cache = comfy_cache.current()
    figures = cache.engine.as_dict() if cache is not None else None
    taken = take_snapshot()
    return {"memory": taken.as_dict(), "words": taken.in_words(), "models": models, "cache": figures}


def take_snapshot() -> MemorySnapshot:
    """All memory figures of this moment."""
    cache = comfy_cache.current()
    models = list(dynamic.models)
    return MemorySnapshot.take(
        pinned=sum(model.pinned_bytes for model in models),
        resident=sum(0 if model.backend.in_place else model.resident_bytes for model in models),
        cached=cache.engine.ram_bytes() if cache is not None else 0,
    )


def model_records() -> list[dict[str, Any]]:
    """One record for each dynamic model that is alive, and for each of the core's that is loaded."""
    found = [_ours(model) for model in list(dynamic.models)]
    for loaded in list(comfy.model_management.current_loaded_models):
        patcher = loaded.model
        if patcher is not None and not is_ours(patcher):
            found.append(
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
    return sorted(found, key=lambda record: -record["total"])


def _ours(model: dynamic.DynamicModel) -> dict[str, Any]:
    mapped = sum(bundle.store_bytes for bundle in model.bundles if next(iter(bundle.maps()), None) is not None)
    on_device = model.resident_bytes + model.permanent_bytes
    in_place = model.backend.in_place
    return {
        "name": model.ledger.name,
        "by": "Spillway",
        "device": str(model.device),
        "total": model.total_bytes,
        # On a CPU what is resident are pages of RAM.
        "bytes": {
            "vram": 0 if in_place else on_device,
            "pins": model.pinned_bytes,
            "ram": on_device if in_place else 0,
            "disk": mapped,
        },
        "vbar": model.vbar_kind,
        "decisions": list(model.ledger.decisions)[-DECISIONS:],
        "residency": [[name, nbytes, resident] for name, nbytes, resident in model.residency()],
    }


def in_lines(report: dict[str, Any]) -> str:
    """The report for a person."""
    memory = report["memory"]
    lines = [
        f"Memory: {report['words']}",
        f"Of {in_words(memory['total'])}, limited by {memory['reason']}",
        "",
        "Models" if report["models"] else "Models: none is loaded",
    ]
    for model in report["models"]:
        places = ", ".join(f"{place} {in_words(size)}" for place, size in model["bytes"].items() if size)
        lines.append(f"  {model['name']} ({model['by']}, {model['device']}), {in_words(model['total'])}: {places}")
        lines += [f"    {decision}" for decision in model["decisions"]]
    cache = report["cache"]
    if cache is None:
        return "\n".join([*lines, "", "Output cache: ComfyUI's own"])
    held, headroom = in_words(cache["ram_bytes"]), in_words(cache["headroom_bytes"])
    lines += ["", f"Output cache: {cache['entries']} outputs, {held}; keeps {headroom} free"]
    for entry in cache["largest"]:
        notes = [f"{entry['seconds']:.1f} s to make", f"{entry['age_prompts']} prompts ago"]
        notes += ["shared"] * entry["shared"] + ["never evicted"] * entry["never_evict"]
        lines.append(f"  {entry['node']} ({entry['id']}): {in_words(entry['ram_bytes'])}, {', '.join(notes)}")
    lines += [f"    {decision}" for decision in cache["decisions"][-DECISIONS:]]
    return "\n".join(lines)
