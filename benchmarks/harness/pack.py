"""Make the repository importable as the package ``spillway``, whatever its folder is called.

ComfyUI loads the pack under a name that it derives from the folder, and the engine uses relative imports only. The
benchmarks and the demo therefore give the same folder a name of their own instead of installing anything.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load_pack(name: str = "spillway") -> ModuleType:
    """Return the repository root as the package ``name``, imported by the first call."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT / '__init__.py'} cannot be loaded: run this from a complete checkout of the pack")
    module = importlib.util.module_from_spec(spec)
    # Before executing it: the package's own relative imports look their parent up in sys.modules.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
