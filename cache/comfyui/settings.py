"""The pack's settings in ComfyUI: what its default user set, and the variables that go before it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import folder_paths

from ...ops import settings

DISK_SECONDS = 10.0
# ComfyUI empties the file before it writes it anew. Whoever reads it in between finds nothing, or a part.
WRITTEN_WITHIN, PAUSE, TIMES = 1.0, 0.02, 5


def setting(kind: settings.Number | settings.Switch) -> Any:
    """Read a setting of ComfyUI's default user. None where there is none, or none that makes sense."""
    path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        values = _read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        settings.warn_once(f"{path} cannot be read ({error}): the defaults of Spillway's settings are used.")
        return None
    if not isinstance(values, dict):
        settings.warn_once(f"{path} cannot be read (no JSON object): the defaults of Spillway's settings are used.")
        return None
    return settings.setting(kind, values)


def _read(path: Path) -> Any:
    """Read the file, and again for a moment where it is damaged and was written just now."""
    for _ in range(TIMES):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            if abs(time.time() - path.stat().st_mtime) > WRITTEN_WITHIN:
                raise
            time.sleep(PAUSE)
    return json.loads(path.read_text(encoding="utf-8"))


def ram_cap() -> int | None:
    """Return the most bytes of RAM that outputs may hold. None where only the headroom counts, as by default."""
    return _cap(settings.CACHE_GB, settings.CACHE_RAM_GB)


def models_cap() -> int | None:
    """Return the most bytes of a device that all models may hold together. None for no cap, as by default."""
    return _cap(settings.MODELS_GB, settings.MODELS_DEVICE_GB)


def _cap(variable: settings.Number, in_comfyui: settings.Number) -> int | None:
    """Read a cap in bytes, of which 0 is none. The variable goes before the setting."""
    gigabytes = settings.variable(variable)
    if gigabytes is None:
        gigabytes = setting(in_comfyui)
    return int(gigabytes * (1 << 30)) if gigabytes else None


def disk_gigabytes() -> float:
    """Return the cap of the disk tier in GB. 0 where it is off, as it is by default."""
    return setting(settings.DISK_GB) or 0.0


def disk_seconds() -> float:
    """Return how long an output must have taken to make to be worth a file."""
    found = setting(settings.DISK_SECONDS)
    return DISK_SECONDS if found is None else found


def cache_turned_off() -> str | None:
    """Say why the output cache is turned off. None where it is on. The variable goes before the setting."""
    wanted = settings.variable(settings.CACHE)
    if wanted is not None:
        return None if wanted else f"{settings.CACHE.name}=0"
    return "turned off in the settings" if setting(settings.CACHE_ENABLED) is False else None
