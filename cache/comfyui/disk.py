"""The disk tier in ComfyUI: its folder, its cap, and names that only outputs of unchanged files and nodes have."""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfyui_version
import folder_paths
import torch
from comfy.cli_args import args

from ...ops.device.identity import identity, installed
from ...ops.ram.available import available_ram
from ..disk_tier import DiskTier, name_of
from ..packages import packages_digest
from . import settings
from .stamps import STARTED, comfyui_digest, own_digest

GIB = 1 << 30
# Flags that change no output: of the server, of its folders (files have stamps), of logs, previews and caches, and the
# number of the card (its name counts). Any other one may change what is computed, as --force-fp32 does, and so may one
# that a later version adds.
HARMLESS = re.compile(
    "^(listen|port|tls_|enable_cors|max_upload|auto_launch|disable_auto|preview_|cache_|front_end|enable_compress"
    "|multi_user|verbose|log_|dont_print|debug_|database_url|enable_manager|disable_manager|enable_assets"
    "|quick_test|disable_metadata|cuda_device|user_directory|.*_directory$|extra_model_paths)"
)


def make_tier(ledger: Any, gigabytes: float | None = None, former: DiskTier | None = None) -> DiskTier | None:
    """The tier with a cap in GB (None: as the settings say), or None where it is off, as it is by default.

    former: the last prompt's, which remembers whether its folder can be written to.
    """
    # All settings are looked at, so that one that makes no sense is named also while the tier is off.
    cap, seconds = settings.disk_gigabytes(), settings.disk_seconds()
    cap = cap if gigabytes is None else gigabytes
    if not 0 < cap < 1e6:
        return None
    what = outdated() or ("packages of this Python" if packages() is None else None)
    if what is not None:
        ledger.decide_once(f"disk tier: off until the next start, as {what} have changed since this one")
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

    What a key does not say of machine, versions and flags is part of the name. The files that it names are stamped: see
    stamps.py.
    """
    return name_of(key, [*made_by(), packages()])


def outdated() -> str | None:
    """Say which code has changed since this process began, so that nobody knows what runs. None where none has."""
    if comfyui_digest() is None:
        return "files of ComfyUI"
    return "files of Spillway" if own_digest() is None else None


@functools.cache
def packages() -> str | None:
    """Hash which packages this Python has. They count on this machine alone, as no two have the same."""
    return packages_digest(STARTED)


def made_by() -> list[Any]:
    """Return what the bits of an output depend on beside its inputs and files: device, versions, flags."""
    return [_versions(str(comfy.model_management.get_torch_device())), _flags()]


@functools.cache
def _versions(device: str) -> list[Any]:
    return [
        identity(torch.device(device)),
        torch.backends.cpu.get_cpu_capability(),
        comfyui_version.__version__,
        comfyui_digest(),
        own_digest(),
        installed("comfy-kitchen"),
    ]


def _flags() -> dict[str, Any]:
    """Return the flags that ComfyUI was started with, without those that change no output."""
    return {
        name: sorted(map(str, value)) if isinstance(value, set) else str(value)
        for name, value in vars(args).items()
        if not HARMLESS.search(name)
    }
