"""Find a ComfyUI and the Python that runs it, for dev.py, tests and benchmarks.

Imports the standard library alone, because the Python that runs dev.py may have nothing else.

COMFYUI_PATH      the ComfyUI; else the one whose custom_nodes holds this pack, else ~/comfy/ComfyUI
COMFYUI_PYTHON    the Python that runs it; else a venv beside or inside it, else this one
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from .environment import ROOT, succeeds, venv_python


class WrongVariable(Exception):
    """A variable names something that is not there. The message says which, and what to set."""


def is_comfyui(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("main.py", "comfyui_version.py", "comfy/sd.py"))


def find_comfyui() -> Path | None:
    """Return None where there is none. Raise WrongVariable where COMFYUI_PATH names none."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        folder = Path(named).expanduser().absolute()
        if not is_comfyui(folder):
            raise WrongVariable(f"COMFYUI_PATH is {named}, which holds no ComfyUI. Set it to a ComfyUI folder.")
        return folder
    # The pack may be a link in custom_nodes. ComfyUI is then around the link, and another one may be around its target.
    around = [pack.parent.parent for pack in (ROOT, ROOT.resolve()) if pack.parent.name == "custom_nodes"]
    return next(filter(is_comfyui, [*around, Path.home() / "comfy" / "ComfyUI"]), None)


def find_comfyui_python(comfyui: Path) -> Path | None:
    """Return None where there is none. Raise WrongVariable where COMFYUI_PYTHON cannot be run."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        found = shutil.which(named)
        if found is None:
            raise WrongVariable(f"COMFYUI_PYTHON is {named}, which cannot be run.")
        return Path(found).absolute()
    venvs = (comfyui.parent / "venv", comfyui / "venv", comfyui / ".venv")
    portable = comfyui.parent / "python_embeded" / "python.exe"  # spelled so in ComfyUI's download for Windows
    for python in (*map(venv_python, venvs), portable):
        if python.is_file():
            return python
    return Path(sys.executable) if succeeds([sys.executable, "-c", "import torch, aiohttp"]) else None
