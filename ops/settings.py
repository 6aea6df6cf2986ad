"""What the user may set: environment variables, and values in ComfyUI's settings.

A value that makes no sense is named once in the log, with what is accepted, and is then as good as not set: the server
must run prompts whatever it is. prestartup_script.py runs this file by its path, before torch: it imports the standard
library alone.
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
    """A number from `least` to `most`; `above`: `least` itself is none."""

    name: str
    least: float
    most: float
    expected: str
    above: bool = False

    def parse(self, value: Any) -> float | None:
        """The number; None where the value is none of these."""
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
    """Something that is on or off."""

    name: str
    expected: str

    def parse(self, value: Any) -> bool | None:
        """On or off; None where the value is neither."""
        word = str(value).strip().lower()
        return True if word in ON else False if word in OFF else None


_GIGABYTES = "a number of gigabytes from 0 on, such as 20"
RAM_GB = Number("SPILLWAY_RAM_GB", 0, 1e6, "a number of gigabytes above 0, such as 16", above=True)
CACHE = Switch("SPILLWAY_CACHE", "1 or 0")
ALLOCATOR = Switch("SPILLWAY_ALLOCATOR", "1 or 0")
CACHE_ENABLED = Switch("Spillway.Cache.Enabled", "true or false")
DISK_GB = Number("Spillway.Cache.DiskGB", 0, 1e6, _GIGABYTES)
DISK_SECONDS = Number("Spillway.Cache.DiskSeconds", 0, 1e9, "a number of seconds from 0 on, such as 10")

VARIABLES: tuple[Number | Switch, ...] = (RAM_GB, CACHE, ALLOCATOR)
IN_COMFYUI: tuple[Number | Switch, ...] = (CACHE_ENABLED, DISK_GB, DISK_SECONDS)


def variable(kind: Number | Switch) -> Any:
    """What an environment variable says; None where it is not set, or makes no sense."""
    text = os.environ.get(kind.name, "").strip()
    return _checked(kind, text) if text else None


def setting(kind: Number | Switch, values: Mapping[str, Any]) -> Any:
    """What ComfyUI's settings say; None where they say nothing, or what makes no sense."""
    value = values.get(kind.name)
    return _checked(kind, value) if value is not None else None


def _checked(kind: Number | Switch, value: Any) -> Any:
    found = kind.parse(value)
    if found is None:
        warn_once(f"{kind.name} is {str(value)[:100]!r}; expected {kind.expected}. It is ignored.")
    return found
