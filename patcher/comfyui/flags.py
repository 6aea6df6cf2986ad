"""ComfyUI's own options about memory, which hold for its models and for ours: streams, page-locking, reserved VRAM."""

from __future__ import annotations

import comfy.model_management as management
from comfy.cli_args import args

from ...ops.device.backend import Backend
from ..dynamic_model import models
from ..ram_pressure import pin_limits

GIB = 1 << 30


def heed_flags(backend: Backend) -> Backend:
    """Let a device keep to the number of streams, to pageable memory, and to the VRAM that ComfyUI is told to leave."""
    if getattr(args, "disable_async_offload", False):
        backend.streams = 0
    elif getattr(args, "async_offload", None) is not None:
        backend.streams = min(backend.streams, args.async_offload)
    backend.locks_memory = not getattr(args, "disable_pinned_memory", False)
    if args.reserve_vram is not None:
        backend.reserved = int(args.reserve_vram * GIB)
    return backend


def room_beside_comfyui() -> int:
    """Count the bytes that may still be page-locked, by ComfyUI's limit and its count."""
    most = getattr(management, "MAX_PINNED_MEMORY", -1)
    if most <= 0:  # ComfyUI locks none, and has no limit
        return 1 << 62
    ours = sum(model.pinned_bytes + model.staging_bytes for model in list(models) if not model.backend.in_place)
    return max(0, int(most - getattr(management, "TOTAL_PINNED_MEMORY", 0) - ours))


pin_limits.append(room_beside_comfyui)
