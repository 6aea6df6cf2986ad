"""Keeps what was found on this machine in a small JSON file, which any process may read or replace at any time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20  # of a file: those who write one keep it far below


def read_record(path: Path | None, name: str) -> dict[str, Any]:
    """Return the object that a file has under a name. What is no such record is taken for none."""
    if path is None:
        return {}
    try:
        if path.stat().st_size > MOST_BYTES:
            return {}
        return dict(json.loads(path.read_text(encoding="utf-8"))[name].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def write_record(path: Path, name: str, found: dict[str, Any], indent: int | None = None) -> None:
    """Replace the file by one with this object. indent: as for `json.dumps`.

    Raises OSError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps({name: found}, indent=indent), encoding="utf-8")
        os.replace(beside, path)  # a process that reads meanwhile finds one of the two, whole
    finally:
        beside.unlink(missing_ok=True)
