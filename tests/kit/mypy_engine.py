"""mypy over the engine, for `dev.py lint`. Imports the standard library alone, as dev.py does."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from .environment import ROOT

ENGINE = ("patcher", "ops", "cache")


def mypy_engine(python: str) -> int:
    """Check a copy of the engine laid out as the package `spillway`: only so do the pack's relative imports resolve."""
    sources = [path for part in ENGINE for path in (ROOT / part).rglob("*.py") if "comfyui" not in path.parts]
    if not sources:
        print("no engine files")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "spillway"
        for source in sources:
            copy = package / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
        (package / "__init__.py").touch()  # empty: the real one leads to ComfyUI's side
        cache = ROOT / ".mypy_cache"
        options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(cache), "-p", "spillway"]
        done = subprocess.run([python, "-m", "mypy", *options], cwd=folder, capture_output=True, text=True)
    for line in (done.stdout + done.stderr).splitlines():
        print(line.removeprefix("spillway" + os.sep))
    return done.returncode
