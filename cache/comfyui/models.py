"""Measures ComfyUI's models: model patchers and the objects that wrap one (CLIP, VAE, CLIP vision)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import comfy.model_patcher

from ..measure import Model, module_bytes, module_sizes


def patcher_of(value: Any) -> Any:
    """Return the model patcher that an output is or wraps. None for other outputs."""
    if isinstance(value, comfy.model_patcher.ModelPatcher):
        return value
    inner = getattr(value, "patcher", None)
    return inner if isinstance(inner, comfy.model_patcher.ModelPatcher) else None


def model_getter(value: Any) -> Model | None:
    """Describe a model to `Measurer`. Clones share their module, and have patches and attached models of their own."""
    patcher = patcher_of(value)
    if patcher is None:
        return None
    also = [patcher.patches, patcher.additional_models, patcher.attachments]
    nested = getattr(patcher, "model_patches_models", None)
    if nested is not None:
        also.append(nested())
    get_models = getattr(value, "get_models", None)
    if value is not patcher and callable(get_models):
        also.append(get_models())
    return Model(patcher.model, _gauge(patcher), also)


def _gauge(patcher: Any) -> Callable[[], tuple[int, int]]:
    weak_patcher, weak_model = weakref.ref(patcher), weakref.ref(patcher.model)

    def gauge() -> tuple[int, int]:
        model, owner = weak_model(), weak_patcher()
        if model is None:
            return 0, 0
        if owner is None:
            return module_bytes(model)
        sizes = model_bytes(owner)
        return sizes["ram"] + sizes["pins"], sizes["vram"]

    return gauge


def model_bytes(patcher: Any) -> dict[str, int]:
    """Return the bytes of a model: vram (of a device other than the CPU), pins, ram, disk (only mapped)."""
    ram, vram, mapped = module_sizes(patcher.model)
    pins = 0
    if patcher.is_dynamic():  # its weights lie in a mapped file, in pins and in a VBAR, which no module shows
        pins = patcher.pinned_memory_size()
        resident = getattr(patcher, "resident_ram_bytes", None)
        ram += resident() if resident is not None else 0
        if patcher.load_device.type != "cpu":
            vram = max(vram, patcher.loaded_size())
    return {"vram": vram, "pins": pins, "ram": ram, "disk": mapped}
