"""The pack's settings: environment variables, and what the user set in ComfyUI's settings."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import folder_paths

log = logging.getLogger("spillway")

CACHE_VARIABLE = "SPILLWAY_CACHE"
CACHE_SETTING = "Spillway.Cache.Enabled"
DISK_GB_SETTING = "Spillway.Cache.DiskGB"
DISK_SECONDS_SETTING = "Spillway.Cache.DiskSeconds"
DISK_SECONDS = 10.0


def setting(name: str, default: Any) -> Any:
    """A value from the settings of ComfyUI's default user; `default` where there is none, or none of its type."""
    path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get(name, default)
    except FileNotFoundError:
        return default
    except (OSError, ValueError, AttributeError) as error:
        log.warning("[Spillway] %s cannot be read (%s): the default of %s is used.", path, error, name)
        return default
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if isinstance(value, type(default)) else default


def cache_turned_off() -> str | None:
    """Why the output cache is turned off, in words; None where it is on. The variable goes before the setting."""
    variable = os.environ.get(CACHE_VARIABLE, "").strip()
    if variable:
        return f"{CACHE_VARIABLE}={variable}" if variable in ("0", "off", "false") else None
    return None if setting(CACHE_SETTING, True) else "turned off in the settings"
