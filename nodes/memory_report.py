"""Reports memory, models, output cache and decisions as data, as text and as a picture."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import numpy
import torch
from PIL import Image, ImageDraw

from ..cache.comfyui.install import current_cache
from ..cache.comfyui.models import model_bytes
from ..cache.runs import Run
from ..cache.snapshot import MemorySnapshot
from ..ops.ledger import in_words
from ..patcher import dynamic_model as dynamic
from ..patcher.comfyui.loading.load import is_ours

DECISIONS = 5
RUNS = 3
WIDTH, ROW, BAR, MARGIN = 1024, 52, 24, 12
BACKGROUND, TEXT = (24, 26, 32), (220, 222, 228)
RESIDENT, AWAY = (86, 196, 140), (66, 72, 88)


def memory_report() -> dict[str, Any]:
    """Return memory, models (Spillway's and ComfyUI's) and cache, ready for JSON, with all sizes in bytes."""
    models = model_records()
    cache = current_cache()
    figures = cache.engine.as_dict() if cache is not None else None
    snapshot = take_snapshot()
    return {"memory": snapshot.as_dict(), "words": snapshot.in_words(), "models": models, "cache": figures}


def take_snapshot() -> MemorySnapshot:
    """Take all memory figures of this moment."""
    cache = current_cache()
    models = list(dynamic.models)
    return MemorySnapshot.take(
        pinned=sum(model.pinned_bytes + model.staging_bytes for model in models),
        resident=sum(0 if model.backend.in_place else model.device_bytes for model in models),
        cached=cache.engine.ram_bytes() if cache is not None else 0,
    )


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


def _ours(model: dynamic.DynamicModel) -> dict[str, Any]:
    mapped = sum(bundle.source_bytes for bundle in model.bundles if next(iter(bundle.maps()), None) is not None)
    on_device = model.device_bytes
    in_place = model.backend.in_place
    return {
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
        "vbar": model.vbar_kind,
        "decisions": list(model.ledger.decisions)[-DECISIONS:],
        "residency": [[name, nbytes, resident] for name, nbytes, resident in model.bundle_report()],
    }


def in_lines(report: dict[str, Any]) -> str:
    """Word the report for people."""
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
    cap = "" if cache["cap_bytes"] is None else f", takes {in_words(cache['cap_bytes'])} at most"
    lines += ["", f"Output cache: {cache['entries']} outputs, {held}; keeps {headroom} free{cap}"]
    lines.append(f"  this run so far {Run(**cache['run']).words}")
    lines += [f"  a run before {Run(**run).words}" for run in reversed(cache["runs"][-RUNS:])]
    for entry in cache["largest"]:
        notes = [f"{entry['seconds']:.1f} s to make", f"{entry['age_prompts']} prompts ago"]
        notes += ["shared"] * entry["shared"] + ["never evicted"] * entry["never_evict"]
        lines.append(f"  {entry['node']} ({entry['id']}): {in_words(entry['ram_bytes'])}, {', '.join(notes)}")
    lines += [f"    {decision}" for decision in cache["decisions"][-DECISIONS:]]
    return "\n".join(lines)


def residency_picture(models: list[dict[str, Any]]) -> torch.Tensor:
    """Draw a bar for each model, with layers as wide as they are large. [1, height, 1024, 3], from 0 to 1."""
    rows = [model for model in models if model["residency"]]
    image = Image.new("RGB", (WIDTH, MARGIN * 2 + ROW * max(1, len(rows))), BACKGROUND)
    draw = ImageDraw.Draw(image)
    if not rows:
        draw.text((MARGIN, MARGIN), "no Spillway model is loaded", fill=TEXT)
    for number, model in enumerate(rows):
        top = MARGIN + number * ROW
        resident = sum(size for _, size, here in model["residency"] if here)
        total = sum(size for _, size, _ in model["residency"]) or 1
        words = f"{model['name']} on {model['device']}: {in_words(resident)} of {in_words(total)} resident"
        draw.text((MARGIN, top), words, fill=TEXT)
        _bar(draw, top + 18, model["residency"], total)
    array = numpy.asarray(image, dtype=numpy.float32) / 255
    return torch.from_numpy(array.copy())[None]


def _bar(draw: Any, top: int, layers: list[Any], total: int) -> None:
    before, width = 0, WIDTH - 2 * MARGIN
    for _, size, resident in layers:
        left, right = before * width // total, (before + size) * width // total
        before += size
        box = (MARGIN + left, top, MARGIN + max(left, right - 2), top + BAR)
        draw.rectangle(box, fill=RESIDENT if resident else AWAY)
