"""The user's settings: environment variables, and values in ComfyUI's settings.

A value that makes no sense is named once in the log, with the values that are accepted, and then counts as not set. The
server must run prompts whatever the value. prestartup_script.py runs this file by its path, before torch, so it imports
the standard library alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

log = logging.getLogger("spillway")

ON, OFF = ("1", "on", "true", "yes"), ("0", "off", "false", "no")

_said: set[str] = set()


def warn_once(text: str) -> None:
    """Log a warning that would otherwise repeat at every prompt."""
    if text not in _said:
        _said.add(text)
        log.warning("[Spillway] %s", text)


class Number(NamedTuple):
    """A number from `least` to `most`. above: `least` itself is refused."""

    name: str
    least: float
    most: float
    expected: str
    above: bool = False

    def parse(self, value: Any) -> float | None:
        """Return the number; None where the value is not in the range or no number."""
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return None
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return None
        # NaN is in no range.
        fits = self.least < number <= self.most if self.above else self.least <= number <= self.most
        return number if fits else None


class Switch(NamedTuple):
    """A setting that is on or off."""

    name: str
    expected: str

    def parse(self, value: Any) -> bool | None:
        """Return True for on, False for off, None for any other value."""
        word = str(value).strip().lower()
        return True if word in ON else False if word in OFF else None


_GIGABYTES = "a number of gigabytes from 0 on, such as 20"
RAM_GB = Number("SPILLWAY_RAM_GB", 0, 1e6, "a number of gigabytes above 0, such as 16", above=True)
CACHE = Switch("SPILLWAY_CACHE", "1 or 0")
CACHE_GB = Number("SPILLWAY_CACHE_GB", 0, 1e6, _GIGABYTES)
MODELS_GB = Number("SPILLWAY_MODELS_GB", 0, 1e6, _GIGABYTES)
ALLOCATOR = Switch("SPILLWAY_ALLOCATOR", "1 or 0")
MANAGE = Switch("SPILLWAY_MANAGE", "1 or 0")
CACHE_ENABLED = Switch("Spillway.Cache.Enabled", "true or false")
CACHE_RAM_GB = Number("Spillway.Cache.RamGB", 0, 1e6, _GIGABYTES)
DISK_GB = Number("Spillway.Cache.DiskGB", 0, 1e6, _GIGABYTES)
DISK_SECONDS = Number("Spillway.Cache.DiskSeconds", 0, 1e9, "a number of seconds from 0 on, such as 10")
MODELS_MANAGE = Switch("Spillway.Models.Manage", "true or false")
MODELS_DEVICE_GB = Number("Spillway.Models.DeviceGB", 0, 1e6, _GIGABYTES)

VARIABLES: tuple[Number | Switch, ...] = (RAM_GB, CACHE, CACHE_GB, MODELS_GB, ALLOCATOR, MANAGE)
IN_COMFYUI: tuple[Number | Switch, ...] = (
    CACHE_ENABLED,
    CACHE_RAM_GB,
    DISK_GB,
    DISK_SECONDS,
    MODELS_DEVICE_GB,
    MODELS_MANAGE,
)


def variable(option: Number | Switch) -> Any:
    """Return the value of an environment variable; None where it is not set, or makes no sense."""
    text = os.environ.get(option.name, "").strip()
    return _checked(option, text) if text else None


def setting(option: Number | Switch, values: Mapping[str, Any]) -> Any:
    """Return the value in ComfyUI's settings; None where it is not set, or makes no sense."""
    value = values.get(option.name)
    return _checked(option, value) if value is not None else None


def _checked(option: Number | Switch, value: Any) -> Any:
    parsed = option.parse(value)
    if parsed is None:
        warn_once(f"{option.name} is {str(value)[:100]!r}; expected {option.expected}. It is ignored.")
    return parsed
