"""Keeps what was found on devices in a JSON file, so that each is checked once."""

from __future__ import annotations

import json
import os
from pathlib import Path

# {device: {check: None where it passed, else what was wrong}}
Found = dict[str, "str | None"]


def read(path: Path | None, device: str) -> Found:
    """Return what the file says about a device. What is no such record is taken for none."""
    return _all(path).get(device, {})


def write(path: Path | None, device: str, found: Found) -> None:
    """Add to what the file says about a device. Raises OSError where it cannot be written."""
    if path is None:
        return
    devices = _all(path)
    devices[device] = {**devices.get(device, {}), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps({"devices": devices}, indent=1), encoding="utf-8")
        os.replace(beside, path)  # a process that reads meanwhile finds one of the two, whole
    finally:
        beside.unlink(missing_ok=True)


def _all(path: Path | None) -> dict[str, Found]:
    if path is None:
        return {}
    try:
        devices = json.loads(path.read_text(encoding="utf-8"))["devices"]
        records = dict(devices.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {device: found for device, found in records.items() if _is_found(found)}


def _is_found(found: object) -> bool:
    return isinstance(found, dict) and all(words is None or isinstance(words, str) for words in found.values())
