"""The pack's settings in ComfyUI: what its default user set, and the variables that go before it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import folder_paths

from ...ops import settings
from ..store.shared_store import Options

DISK_SECONDS = 10.0
STORE_SECONDS, STORE_WAIT_SECONDS, STORE_GB, STORE_DAYS = 10.0, 5.0, 50.0, 30.0
# ComfyUI empties the file before it writes it anew. Whoever reads it in between finds nothing, or a part.
WRITTEN_WITHIN, PAUSE, TIMES = 1.0, 0.02, 5


def setting(kind: settings.Option) -> Any:
    """Read a setting of ComfyUI's default user. None where there is none, or none that makes sense."""
    values = _values()
    return None if values is None else settings.setting(kind, values)


def _values() -> dict[str, Any] | None:
    """Read all settings of ComfyUI's default user. None where they cannot be read, which is said once."""
    path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        values = _read(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        settings.warn_once(f"{path} cannot be read ({error}): the defaults of Spillway's settings are used.")
        return None
    if not isinstance(values, dict):
        settings.warn_once(f"{path} cannot be read (no JSON object): the defaults of Spillway's settings are used.")
        return None
    return values


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


def manages_loaders() -> bool:
    """Say whether every loader is to build Spillway models. The variable goes before the setting."""
    wanted = settings.variable(settings.MANAGE)
    return bool(setting(settings.MODELS_MANAGE) if wanted is None else wanted)


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
    return _or(setting(settings.DISK_SECONDS), DISK_SECONDS)


def store_options() -> Options | None:
    """Return what is set of the shared store. None where it is off, as it is by default."""
    values = _values()  # once, as this is asked at each prompt

    def of(kind: settings.Option) -> Any:
        return None if values is None else settings.setting(kind, values)

    in_comfyui = of(settings.STORE_ADDRESS)
    address = settings.variable(settings.STORE) or in_comfyui
    if address == "off":  # which the variable says, as no setting can
        return None
    key = _store_key(values)
    seconds = _or(of(settings.STORE_SECONDS), STORE_SECONDS)
    wait = _or(of(settings.STORE_WAIT), STORE_WAIT_SECONDS)
    cap, days = _or(of(settings.STORE_SIZE), STORE_GB), _or(of(settings.STORE_DAYS), STORE_DAYS)
    if address and key is None:
        settings.warn_once("the shared store is off, as its key makes no sense or the settings cannot be read.")
        return None
    return Options(address, key or "", seconds, wait, int(cap * (1 << 30)), days) if address else None


def _store_key(values: dict[str, Any] | None) -> str | None:
    """Return the key of the shared store, "" for none. None for one that makes no sense: "" would trust everybody."""
    in_comfyui = None if values is None else settings.setting(settings.STORE_SECRET, values)
    if values is not None and not settings.is_set(settings.STORE_SECRET, values):
        in_comfyui = ""
    return settings.variable(settings.STORE_KEY) if settings.is_set(settings.STORE_KEY) else in_comfyui


def _or(found: float | None, default: float) -> float:
    return default if found is None else found


def cache_turned_off() -> str | None:
    """Say why the output cache is turned off. None where it is on. The variable goes before the setting."""
    wanted = settings.variable(settings.CACHE)
    if wanted is not None:
        return None if wanted else f"{settings.CACHE.name}=0"
    return "turned off in the settings" if setting(settings.CACHE_ENABLED) is False else None
