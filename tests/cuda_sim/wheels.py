"""Fetch the comfy-aimdo releases that the pack is tested with, from the package index that pip uses."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from . import CACHE, Unavailable

VERSIONS = ("0.3.0", "0.4.5", "0.4.13", "0.5.6", "0.6.0")
ALWAYS = ("0.3.0", "0.4.13", "0.6.0")  # the oldest that works, that of ComfyUI 0.33, the newest


def package(version: str) -> Path:
    """The folder that holds the package comfy_aimdo of a release. Raises Unavailable where it cannot be fetched."""
    folder = CACHE / f"comfy-aimdo-{version}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as part:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--timeout=15", "--retries=1", "--dest", part, f"comfy-aimdo=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(part).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise Unavailable(f"comfy-aimdo {version} cannot be fetched with pip: {last}")
        unpacked = Path(part) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(unpacked)
        # Another process may have been faster; a folder under its final name is always whole.
        try:
            shutil.move(unpacked, folder)
        except OSError:
            if not folder.exists():
                raise
    return folder
