"""Keeps what was found on devices in a JSON file, so that each is checked once."""

from __future__ import annotations

from pathlib import Path

from ..json_record import read_record, write_record

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
    write_record(path, "devices", devices, indent=1)  # for people too


def _all(path: Path | None) -> dict[str, Found]:
    return {device: found for device, found in read_record(path, "devices").items() if _is_found(found)}


def _is_found(found: object) -> bool:
    return isinstance(found, dict) and all(words is None or isinstance(words, str) for words in found.values())
