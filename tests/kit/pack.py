"""Load the pack as the package `spillway`, whatever its folder is called, as ComfyUI does under a name of its own."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if "spillway" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "spillway", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["spillway"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["spillway"])
