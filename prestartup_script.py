"""Does what must happen before torch is imported. ComfyUI runs this file by itself, before the rest of the pack."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any


def _load_early(name: str, file: str) -> Any:
    """Load a file of the pack as a module by itself. The pack's __init__ and its packages would import torch."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parent / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


if "torch" not in sys.modules:
    settings = _load_early("spillway_settings", "ops/settings.py")
    wanted = settings.variable(settings.ALLOCATOR)
    _load_early("spillway_allocator", "ops/ram/allocator.py").tune(wanted is not False)
