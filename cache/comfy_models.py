"""The host's models as the measurer asks for them: model patchers, and what wraps one (CLIP, VAE, CLIP vision)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import comfy.model_patcher

from .measure import Model, module_bytes


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
        ram, vram = module_bytes(model)
        if owner is not None and owner.is_dynamic():  # its weights lie in a file's map, and in pins and a VBAR
            ram += owner.pinned_memory_size()
            vram = max(vram, owner.loaded_size()) if owner.load_device.type != "cpu" else 0
        return ram, vram

    return gauge
