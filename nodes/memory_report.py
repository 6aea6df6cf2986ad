"""Reports memory, models, output cache and decisions as data, as text and as a picture."""

from __future__ import annotations

from functools import cache as cache_forever
from itertools import count
from typing import Any

import numpy
import torch
from PIL import Image, ImageDraw

from ..cache.comfyui.install import current_cache
from ..cache.comfyui.sharing import in_line
from ..cache.runs import Run
from ..cache.snapshot import MemorySnapshot
from ..ops.ledger import in_words
from ..ops.remote.fetch import now_coming
from ..patcher import dynamic_model as dynamic
from ..patcher.comfyui.run_record import last_run
from .model_records import DECISIONS, model_records, notices

RUNS = 3
WIDTH, ROW, BAR, MARGIN = 1024, 52, 24, 12
_numbers = count(1)
BACKGROUND, TEXT = (24, 26, 32), (220, 222, 228)
RESIDENT, AWAY = (86, 196, 140), (66, 72, 88)


def memory_report() -> dict[str, Any]:
    """Return memory, models (Spillway's and ComfyUI's), files that come, cache, shared store and last run, for JSON.

    All sizes are in bytes.

    number: counts reports, so that two that are the same one are known as such.
    """
    models = model_records()
    cache = current_cache()
    figures = cache.engine.as_dict() if cache is not None else None
    snapshot, run = take_snapshot(), last_run()
    told = notices()
    if cache is not None:
        for ledger in (cache.engine.ledger, cache.sharing.ledger):
            told += [{"number": number, "from": ledger.name, "text": text} for number, text in list(ledger.notices)]
    return {
        "number": next(_numbers),
        "memory": snapshot.as_dict(),
        "words": snapshot.in_words(),
        "names": {name: _device_name(name) for name in snapshot.devices},
        "models": models,
        "coming": now_coming(),
        "cache": figures,
        "store": cache.sharing.as_dict() if cache is not None else None,
        "run": run.as_dict() if run is not None else None,
        "notices": sorted(told, key=lambda notice: notice["number"]),
    }


@cache_forever
def _device_name(name: str) -> str:
    kind = torch.device(name).type
    module = getattr(torch, kind, None)
    return str(module.get_device_name(name)) if module is not None and hasattr(module, "get_device_name") else name


def take_snapshot() -> MemorySnapshot:
    """Take all memory figures of this moment."""
    cache = current_cache()
    models = list(dynamic.models)
    return MemorySnapshot.take(
        pinned=sum(model.pinned_bytes + model.staging_bytes for model in models),
        resident=sum(0 if model.backend.in_place else model.device_bytes for model in models),
        cached=cache.engine.ram_bytes() if cache is not None else 0,
    )


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
    lines += [f"Coming: {_coming_in_words(file)}" for file in report["coming"]]
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
    store = report["store"]
    if store is not None:
        lines += ["", f"Shared store: {in_line(store)}"]
        lines += [f"    {decision}" for decision in store["decisions"][-DECISIONS:]]
    return "\n".join(lines)


def _coming_in_words(file: dict[str, Any]) -> str:
    part = f"{in_words(file['come_bytes'])} of {in_words(file['total_bytes'])}"
    how = f"no more comes: {file['stopped']}" if file["stopped"] else f"{in_words(int(file['speed']))} a second"
    return f"{file['file']} from {file['address']}: {part}, {how}"


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
