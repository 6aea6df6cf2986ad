"""Lets cached outputs on a device give way to models, for which ComfyUI makes room among models alone.

Outputs lie on a device where ComfyUI is told so (`--gpu-only`), and where a node of another pack leaves them there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch

from ...ops.never_raises import never_raises
from .cache import SpillwayCache

EVERYTHING = 1e30  # bytes that ComfyUI asks for to unload all models, where nothing needs the room


def install(current_cache: Callable[[], SpillwayCache | None]) -> None:
    """Evict outputs when ComfyUI makes room for a model and models were not enough. A second call does nothing."""
    original = comfy.model_management.free_memory
    if hasattr(original, "spillway_original"):
        return

    @never_raises("output cache: making room on a device")
    def relieve(memory_required: float, device: torch.device | None) -> None:
        cache = current_cache()
        if cache is None or device is None or device.type == "cpu" or memory_required >= EVERYTHING:
            return
        short = memory_required - comfy.model_management.get_free_memory(device)
        cache.engine.relieve_device(str(device), int(short), cache.needed)

    @functools.wraps(original)
    def free_memory(memory_required: float, device: Any, *args: Any, **kwargs: Any) -> Any:
        unloaded = original(memory_required, device, *args, **kwargs)
        relieve(memory_required, device)
        return unloaded

    free_memory.spillway_original = original  # type: ignore[attr-defined]
    comfy.model_management.free_memory = free_memory
