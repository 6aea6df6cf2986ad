"""The disk tier in ComfyUI: its folder, its cap, and names that only outputs of unchanged files and nodes have."""

from __future__ import annotations

import inspect
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfyui_version
import folder_paths
import nodes
import torch

from ...ops.ram.available import available_ram
from ..disk_tier import DiskTier, name_of
from . import settings

GIB = 1 << 30
MODEL_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pt2", ".pth", ".bin", ".gguf", ".onnx")


def make_tier(ledger: Any, gigabytes: float | None = None) -> DiskTier | None:
    """The tier with a cap in GB (None: as the settings say), or None where it is off, as it is by default."""
    # All settings are looked at, so that one that makes no sense is named also while the tier is off.
    cap, seconds = settings.disk_gigabytes(), settings.disk_seconds()
    cap = cap if gigabytes is None else gigabytes
    if not 0 < cap < 1e6:
        return None
    return DiskTier(folder(), int(cap * GIB), seconds, ledger, room=lambda: available_ram().available)


def folder() -> Path:
    """Return a folder beside those of ComfyUI's users. ComfyUI serves none whose name begins with two underscores."""
    return Path(folder_paths.get_user_directory()) / "__spillway" / "outputs"


def file_name(key: Hashable) -> str | None:
    """Return the name of an entry. None for keys that another process cannot make.

    A key only names model files and node classes. The stamps of those files and of the classes' source are part of the
    name. Without them an output of another file of that name, or of another version of a node, would be found.
    """
    strings = sorted(set(_strings(key)))
    salt = {
        "comfyui": comfyui_version.__version__,
        "torch": torch.__version__,
        "device": str(comfy.model_management.get_torch_device()),
        "files": [_files(text) for text in strings if text.lower().endswith(MODEL_FILES)],
        "nodes": [_source(text) for text in strings if text in nodes.NODE_CLASS_MAPPINGS],
    }
    return name_of(key, salt)


def _strings(key: Any) -> list[str]:
    strings, pending = [], [key]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            strings.append(value)
        elif isinstance(value, tuple | list | frozenset):
            pending.extend(value)
    return strings


def _files(name: str) -> list[Any]:
    paths = (folder_paths.get_full_path(kind, name) for kind in sorted(folder_paths.folder_names_and_paths))
    return [name, *(_stamp(path) for path in paths if path is not None)]


def _source(name: str) -> list[Any]:
    try:
        path = inspect.getsourcefile(nodes.NODE_CLASS_MAPPINGS[name])
    except TypeError:  # its class was not made by a file
        path = None
    return [name, _stamp(path) if path is not None else None]


def _stamp(path: str) -> list[int]:
    try:
        state = os.stat(path)
    except OSError:
        return []
    return [state.st_size, state.st_mtime_ns]
