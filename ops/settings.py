"""The user's settings: environment variables, and values in ComfyUI's settings.

A value that makes no sense is named once in the log, with the values that are accepted, and then counts as not set. The
server must run prompts whatever the value. prestartup_script.py runs this file by its path, before torch, so it imports
the standard library alone.
"""

from __future__ import annotations

import logging
import os
import re
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


class Text(NamedTuple):
    """A text that a pattern describes as a whole. secret: the log never shows it. else_: what others are."""

    name: str
    pattern: str
    expected: str
    secret: bool = False
    else_: str = "ignored"

    def parse(self, value: Any) -> str | None:
        """Return the text; None where the pattern does not fit, or it is no text that can be written."""
        if not isinstance(value, str) or not re.fullmatch(self.pattern, value.strip()) or not value.isprintable():
            return None
        return value.strip()


Option = Number | Switch | Text

_GIGABYTES = "a number of gigabytes from 0 on, such as 20"
RAM_GB = Number("SPILLWAY_RAM_GB", 0, 1e6, "a number of gigabytes above 0, such as 16", above=True)
CACHE = Switch("SPILLWAY_CACHE", "1 or 0")
CACHE_GB = Number("SPILLWAY_CACHE_GB", 0, 1e6, _GIGABYTES)
MODELS_GB = Number("SPILLWAY_MODELS_GB", 0, 1e6, _GIGABYTES)
ALLOCATOR = Switch("SPILLWAY_ALLOCATOR", "1 or 0")
# A path that starts at its root, or any other address with its protocol.
_ADDRESS = r"(/|~|[A-Za-z]:[\\/]|\\\\|[a-z][a-z0-9+.-]+://).{0,2000}"
_ADDRESSES = "an address such as file:///mnt/nas/cache or s3://bucket/prefix"
STORE = Text("SPILLWAY_STORE", f"off|{_ADDRESS}", f"{_ADDRESSES}, or off", secret=True)
STORE_KEY = Text("SPILLWAY_STORE_KEY", r".{8,200}", "a text of 8 to 200 characters", secret=True)
REMOTE = Text(
    "SPILLWAY_REMOTE",
    r"(?i:off|all)|(\s*[A-Za-z][A-Za-z0-9+.-]*://[^,]*,)*\s*[A-Za-z][A-Za-z0-9+.-]*://[^,]*,?",
    "off, all, or addresses with a comma between them, such as https://huggingface.co/,s3://models/",
    secret=True,
    else_="taken for off",
)
MANAGE = Switch("SPILLWAY_MANAGE", "1 or 0")
CACHE_ENABLED = Switch("Spillway.Cache.Enabled", "true or false")
CACHE_RAM_GB = Number("Spillway.Cache.RamGB", 0, 1e6, _GIGABYTES)
DISK_GB = Number("Spillway.Cache.DiskGB", 0, 1e6, _GIGABYTES)
DISK_SECONDS = Number("Spillway.Cache.DiskSeconds", 0, 1e9, "a number of seconds from 0 on, such as 10")
STORE_ADDRESS = Text("Spillway.Store.Address", _ADDRESS, _ADDRESSES, secret=True)
STORE_SECRET = Text("Spillway.Store.Key", r".{8,200}", "a text of 8 to 200 characters", secret=True)
STORE_SECONDS = Number("Spillway.Store.Seconds", 0, 1e9, "a number of seconds from 0 on, such as 10")
STORE_WAIT = Number("Spillway.Store.WaitSeconds", 0, 1e9, "a number of seconds from 0 on, such as 5")
STORE_SIZE = Number("Spillway.Store.GB", 0, 1e6, _GIGABYTES)
STORE_DAYS = Number("Spillway.Store.Days", 0, 1e6, "a number of days from 0 on, such as 30")
MODELS_MANAGE = Switch("Spillway.Models.Manage", "true or false")
MODELS_DEVICE_GB = Number("Spillway.Models.DeviceGB", 0, 1e6, _GIGABYTES)

VARIABLES: tuple[Option, ...] = (RAM_GB, CACHE, CACHE_GB, MODELS_GB, ALLOCATOR, STORE, STORE_KEY, REMOTE, MANAGE)
_OF_THE_STORE = (STORE_ADDRESS, STORE_SECONDS, STORE_SECRET, STORE_WAIT, STORE_SIZE, STORE_DAYS)
IN_COMFYUI: tuple[Option, ...] = (
    *(CACHE_ENABLED, CACHE_RAM_GB, DISK_GB, DISK_SECONDS),
    *_OF_THE_STORE,
    MODELS_DEVICE_GB,
    MODELS_MANAGE,
)


def is_set(option: Option, values: Mapping[str, Any] | None = None) -> bool:
    """Say whether an option is set, to whatever value: in ComfyUI's settings, or without them in the environment."""
    value = os.environ.get(option.name) if values is None else values.get(option.name)
    blank = values is None or isinstance(option, Text)  # a field that somebody has emptied
    return value is not None and not (blank and isinstance(value, str) and not value.strip())


def variable(option: Option) -> Any:
    """Return the value of an environment variable; None where it is not set, or makes no sense."""
    return _checked(option, os.environ[option.name].strip()) if is_set(option) else None


def setting(option: Option, values: Mapping[str, Any]) -> Any:
    """Return the value in ComfyUI's settings; None where it is not set, or makes no sense."""
    return _checked(option, values[option.name]) if is_set(option, values) else None


def _else(option: Option) -> str:
    return option.else_ if isinstance(option, Text) else "ignored"


def _checked(option: Option, value: Any) -> Any:
    parsed = option.parse(value)
    if parsed is None:
        shown = "not shown here" if isinstance(option, Text) and option.secret else repr(str(value)[:100])
        warn_once(f"{option.name} is {shown}; expected {option.expected}. It is {_else(option)}.")
    return parsed
