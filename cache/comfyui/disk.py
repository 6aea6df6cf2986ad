"""The disk tier in ComfyUI: its folder, its cap, and names that only outputs of unchanged files and nodes have."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfyui_version
import folder_paths
import torch

from ...ops.ram.available import available_ram
from ..disk_tier import DiskTier, name_of
from . import settings

GIB = 1 << 30


def make_tier(ledger: Any, gigabytes: float | None = None, former: DiskTier | None = None) -> DiskTier | None:
    """The tier with a cap in GB (None: as the settings say), or None where it is off, as it is by default.

    former: the last prompt's, which remembers whether its folder can be written to.
    """
    # All settings are looked at, so that one that makes no sense is named also while the tier is off.
    cap, seconds = settings.disk_gigabytes(), settings.disk_seconds()
    cap = cap if gigabytes is None else gigabytes
    if not 0 < cap < 1e6:
        return None
    if former is not None and former.folder == folder():
        former.cap, former.least_seconds = int(cap * GIB), seconds
        return former
    return DiskTier(folder(), int(cap * GIB), seconds, ledger, room=lambda: available_ram().available)


def folder() -> Path:
    """Return a folder beside those of ComfyUI's users. ComfyUI serves none whose name begins with two underscores."""
    return Path(folder_paths.get_user_directory()) / "__spillway" / "outputs"


def file_name(key: Hashable) -> str | None:
    """Return the name of an entry. None for keys that another process cannot make.

    What a key does not say of the machine is part of the name. The files that it names are stamped: see stamps.py.
    """
    salt = {
        "comfyui": comfyui_version.__version__,
        "torch": torch.__version__,
        "device": str(comfy.model_management.get_torch_device()),
    }
    return name_of(key, salt)
