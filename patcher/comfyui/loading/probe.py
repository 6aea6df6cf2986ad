"""Asks ComfyUI's own detection what it would make of a file."""

from __future__ import annotations

from typing import Any

import comfy.model_detection

from ....ops.files.check_before_read import CheckBeforeRead
from ....ops.files.probe import Probe
from ....ops.files.watched_file import FileChanged
from ....ops.parts.open_map import open_map
from ....ops.parts.probe import probe


def probe_file(path: str) -> tuple[Probe, str]:
    """Probe a file -> (what it is, ComfyUI's name for its diffusion model or ''). Raises SourceError if malformed.

    The detection reads a few numbers of the tensors at most.
    """
    result = probe(path)
    may_hold_model = result.kind in ("diffusion model", "checkpoint") or "unknown" in result.kind
    return result, comfyui_name(path) if may_hold_model else ""


def comfyui_name(path: str) -> str:
    """Find ComfyUI's name for the diffusion model in a file, or '' where it knows none."""
    disk_map = open_map(path)
    tensors: dict[str, Any] = disk_map.state_dict()
    with CheckBeforeRead(disk_map.files):
        prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
        for begin in (prefix, ""):
            try:
                config = comfy.model_detection.model_config_from_unet(tensors, begin)
            except FileChanged:
                raise
            except (KeyError, IndexError, ValueError, RuntimeError, TypeError):  # names of one model, shapes of another
                continue
            if config is not None:
                return type(config).__name__
    return ""
