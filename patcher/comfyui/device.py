"""Moves one model by hand: onto its device, off it, out of RAM, to another device."""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_management
import torch

from ...ops.errors import SpillwayError
from ..preload import load_now as engine_load_now
from .loading.load import is_ours
from .progress import Progress
from .running import drop_unloaded


class DeviceIgnored(SpillwayError, ValueError):
    """Says that a device is not there, or that the model would not really run on it."""


def device_names() -> list[str]:
    """List the devices of this machine that models can be moved to, by torch's names."""
    names = ["cpu"]
    for device_type in ("cuda", "xpu", "npu", "mlu"):
        module = getattr(torch, device_type, None)
        if module is not None and module.is_available():
            names += [f"{device_type}:{index}" for index in range(module.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def load_now(patcher: Any) -> None:
    """Bring a model onto its device, as far as there is room."""
    drop_unloaded()
    comfy.model_management.load_models_gpu([patcher])
    if is_ours(patcher):
        engine_load_now(patcher.dynamic, Progress())


def unload(patcher: Any) -> None:
    """Take a model off its device; its pins and RAM stay. Does nothing where it is not loaded."""
    drop_unloaded()
    if is_ours(patcher):
        if patcher.state.dynamic is not None:
            patcher.state.dynamic.free()
        return
    everything = comfy.model_management.current_loaded_models
    others = [loaded for loaded in everything if not _is_of(loaded, patcher)]
    if len(others) < len(everything):
        comfy.model_management.free_memory(1e30, patcher.load_device, others)


def drop(patcher: Any) -> str | None:
    """Give back device memory, pins and cached pages. Says why some RAM stays, where it does.

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
    """Clone a patcher to run on the named device. Returns the patcher itself where it does already.

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
    copied = patcher.clone()
    copied.load_device = device
    if is_ours(copied):
        copied.register_load_device(device)
    return copied


def moved_clip(clip: Any, name: str) -> Any:
    """Copy a CLIP onto the named device. Raises DeviceIgnored."""
    copied = clip.clone()
    copied.patcher = moved(clip.patcher, name)
    return copied


def moved_vae(vae: Any, name: str) -> Any:
    """Copy a VAE onto the named device. Raises DeviceIgnored."""
    copied = copy.copy(vae)
    copied.patcher = moved(vae.patcher, name)
    copied.device = torch.device(name)
    return copied


def _is_of(loaded: Any, patcher: Any) -> bool:
    return loaded.model is not None and loaded.model.model is patcher.model
