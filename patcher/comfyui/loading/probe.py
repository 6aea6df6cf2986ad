"""What the host would make of a file: its own detection, on views of the file."""

from __future__ import annotations

from typing import Any

import comfy.model_detection

from ....ops.files.disk_map import DiskMap
from ....ops.files.probe import Probe, probe


def probe_file(path: str) -> tuple[Probe, str]:
    """(what the file is, the host's name for its diffusion model or ''). Raises SourceError for a malformed file.

    Of the tensors the host reads a few numbers at most.
    """
    found = probe(path)
    return found, host_name(path) if found.kind in ("diffusion model", "checkpoint") or "unknown" in found.kind else ""


def host_name(path: str) -> str:
    """The host's name for the diffusion model in a file; '' where it knows none."""
    tensors: dict[str, Any] = DiskMap(path).state_dict()
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    for begin in (prefix, ""):
        try:
            config = comfy.model_detection.model_config_from_unet(tensors, begin)
        except (KeyError, IndexError, ValueError, RuntimeError, TypeError):  # names of one model, shapes of another
            continue
        if config is not None:
            return type(config).__name__
    return ""
