"""The host's models as the measurer asks for them: model patchers, and what wraps one (CLIP, VAE, CLIP vision)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import comfy.model_patcher

from ..measure import Model, module_bytes, module_sizes


def patcher_of(value: Any) -> Any:
    """The model patcher that an output is or wraps; None for other outputs."""
    if isinstance(value, comfy.model_patcher.ModelPatcher):
        return value
    inner = getattr(value, "patcher", None)
    return inner if isinstance(inner, comfy.model_patcher.ModelPatcher) else None


def model_getter(value: Any) -> Model | None:
    """A getter for `Measurer`. Clones share their module; each has patches and attached models of its own."""
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
        where = model_bytes(owner)
        return where["ram"] + where["pins"], where["vram"]

    return gauge


def model_bytes(patcher: Any) -> dict[str, int]:
    """Bytes of a patcher's model by place: vram (of a device that is not the CPU), pins, ram, disk (only mapped)."""
    ram, vram, mapped = module_sizes(patcher.model)
    pins = 0
    if patcher.is_dynamic():  # its weights lie in a file's map, in pins, and in a VBAR
        pins = patcher.pinned_memory_size()
        resident = getattr(patcher, "resident_ram_bytes", None)
        ram += resident() if resident is not None else 0
        if patcher.load_device.type != "cpu":
            vram = max(vram, patcher.loaded_size())
    return {"vram": vram, "pins": pins, "ram": ram, "disk": mapped}
