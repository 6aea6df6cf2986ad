"""Moving one model by hand: onto its device, off it, out of RAM, to another device."""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from .comfy_load import is_ours
from .comfy_loaded import forget_unloaded
from .load_now import load_now as engine_load_now


class DeviceIgnored(ValueError):
    """A device that is not there, or that the model would not really run on."""


def device_names() -> list[str]:
    """The devices of this machine that models can be moved to, by torch's names."""
    names = ["cpu"]
    for kind in ("cuda", "xpu", "npu", "mlu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            names += [f"{kind}:{index}" for index in range(module.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def load_now(patcher: Any) -> None:
    """Bring a model onto its device, as far as there is room."""
    forget_unloaded()
    comfy.model_management.load_models_gpu([patcher])
    if is_ours(patcher):
        bar = comfy.utils.ProgressBar(len(patcher.dynamic.bundles))
        engine_load_now(patcher.dynamic, bar.update_absolute)


def unload(patcher: Any) -> None:
    """Take a model off its device; its pins and RAM stay. Does nothing where it is not loaded."""
    forget_unloaded()
    if is_ours(patcher):
        if patcher.state.dynamic is not None:
            patcher.state.dynamic.free()
        return
    everything = comfy.model_management.current_loaded_models
    others = [loaded for loaded in everything if not _is_of(loaded, patcher)]
    if len(others) < len(everything):
        comfy.model_management.free_memory(1e30, patcher.load_device, others)


def drop(patcher: Any) -> str | None:
    """Give back device memory, pins and cached pages; says why some RAM stays, where it does.

    A dynamic model comes again from its file when it is next used. A classic one has its only copy in RAM.
    """
    unload(patcher)
    if is_ours(patcher):
        if patcher.state.dynamic is not None:
            patcher.state.dynamic.release()
        return None
    if patcher.is_dynamic():
        patcher.partially_unload_ram(1e30)
        return None
    return (
        "its RAM stays: a classic model has no other copy of its weights. Load it with a Spillway loader, or put a "
        "Make Dynamic (Spillway) before this node."
    )


def moved(patcher: Any, name: str) -> Any:
    """A patcher of the same model that runs on the named device.

    Raises DeviceIgnored for a device that this machine lacks, and where the move would have no effect.
    """
    if name not in device_names():
        raise DeviceIgnored(f"there is no device '{name}' here. There are: {', '.join(device_names())}.")
    device = torch.device(name)
    if patcher.is_dynamic() and not is_ours(patcher) and patcher.load_device != device:
        raise DeviceIgnored(
            f"this {type(patcher.model).__name__} is managed by ComfyUI's dynamic VRAM, which would go on using "
            f"{patcher.load_device}. Load it with a Spillway loader, or put a Make Dynamic (Spillway) before this node."
        )
    if patcher.load_device == device:
        return patcher
    unload(patcher)
    made = patcher.clone()
    made.load_device = device
    if is_ours(made):
        made.register_load_device(device)
    return made


def moved_clip(clip: Any, name: str) -> Any:
    """The same CLIP on the named device. Raises DeviceIgnored."""
    made = clip.clone()
    made.patcher = moved(clip.patcher, name)
    return made


def moved_vae(vae: Any, name: str) -> Any:
    """The same VAE on the named device. Raises DeviceIgnored."""
    made = copy.copy(vae)
    made.patcher = moved(vae.patcher, name)
    made.device = torch.device(name)
    return made


def _is_of(loaded: Any, patcher: Any) -> bool:
    return loaded.model is not None and loaded.model.model is patcher.model
