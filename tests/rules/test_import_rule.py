"""The import rule: the engine never imports ComfyUI, and imports inside the pack point one way."""

import ast
from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest

from kit.pack import ROOT

# What each folder may import from the pack. `nodes` is the top; `cache` and `patcher` stand beside each other.
MAY_IMPORT = {
    "ops": {"ops"},
    "patcher": {"patcher", "ops"},
    "cache": {"cache", "ops"},
    "nodes": {"nodes", "patcher", "ops", "cache"},
    "": {"nodes", "patcher", "ops", "cache"},  # the root's own files
}
# Top-level modules and packages of ComfyUI.
COMFYUI = {
    "api_server",
    "app",
    "comfy",
    "comfy_api",
    "comfy_api_nodes",
    "comfy_config",
    "comfy_execution",
    "comfy_extras",
    "comfyui_version",
    "execution",
    "folder_paths",
    "latent_preview",
    "main",
    "node_helpers",
    "nodes",
    "server",
    "utils",
}
# Below a folder of this name, and in `nodes`, is ComfyUI's side of the pack; the rest is the engine.
WALL = "comfyui"
# An absolute import of these finds the pack only where its folder happens to be on sys.path. `nodes` is not among them:
# on ComfyUI's side `import nodes` means ComfyUI's nodes.py, and the engine may import no module of ComfyUI.
OWN = {"cache", "dev", "ops", "patcher", "prestartup_script", "spillway"}


def violations(path: str, source: str) -> list[str]:
    """What in `source` breaks the rule. `path` is the file's, from the root of the pack, with forward slashes."""
    file = PurePosixPath(path)
    folder = file.parts[0] if len(file.parts) > 1 else ""
    # ComfyUI runs prestartup_script.py by itself, before it imports the pack, so that too is on ComfyUI's side.
    may_import_comfyui = folder == "nodes" or WALL in file.parent.parts or path == "prestartup_script.py"
    may_cross = may_import_comfyui or path == "__init__.py"

    found = []
    for line, level, parts in imported(ast.parse(source)):
        text = f"{path}:{line}: {'.' * level}{'.'.join(parts)}"
        if level == 0:
            if parts[0] in OWN:
                found.append(f"{text}: the pack's own modules are imported relatively")
            elif parts[0] in COMFYUI and not may_import_comfyui:
                found.append(f"{text}: only nodes/ and folders named {WALL} may import ComfyUI")
            continue
        if level > len(file.parts):
            found.append(f"{text}: leads out of the pack")
            continue
        target = (*file.parts[: len(file.parts) - level], *parts)
        if target[0] not in MAY_IMPORT[folder]:
            found.append(f"{text}: {folder or 'the root'} may import only {', '.join(sorted(MAY_IMPORT[folder]))}")
        elif not may_cross and WALL in target:
            found.append(f"{text}: what lies in {WALL} may be imported only from ComfyUI's side")
    return found


def imported(tree: ast.AST) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """Line, level and dotted parts of each import, also inside functions and TYPE_CHECKING, and by literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, 0, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:  # each name may be a module: `from .. import nodes`
                yield node.lineno, node.level, (*base, alias.name)
        elif isinstance(node, ast.Call) and called_name(node.func) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                bare = name.value.lstrip(".")
                yield node.lineno, len(name.value) - len(bare), tuple(bare.split("."))


def called_name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def pack_files() -> list[str]:
    folders = [folder for folder in MAY_IMPORT if folder]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    files += [path for name in ("__init__.py", "prestartup_script.py") if (path := ROOT / name).is_file()]
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


def test_every_folder_has_files():
    assert {path.split("/")[0] for path in pack_files()} >= {"__init__.py", "ops", "patcher", "cache", "nodes"}


@pytest.mark.parametrize("path", pack_files())
def test_the_pack_holds_the_rule(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/lending/caster.py", "import torch, numpy\nimport comfy_aimdo.control\nfrom .bundle import Bundle"),
        ("ops/caster.py", "from .lending import bundle\nfrom ..ops.pins import Pin"),
        ("ops/comfyui/layers.py", "import comfy.ops\nfrom ..caster import borrow"),
        ("patcher/dynamic.py", "from ..ops import caster\nfrom .policy import Policy"),
        ("patcher/comfyui/loading/load.py", "from comfy import model_patcher\nfrom ..patcher import adapt"),
        ("patcher/vbar/software.py", "from ...ops.bundle import Bundle\nfrom .base import VBAR"),
        ("cache/pressure.py", "from .accounting import size_of\nfrom ..ops.ledger import Ledger"),
        ("nodes/loaders.py", "import nodes\nimport folder_paths\nfrom ..cache.comfyui import cache"),
        ("prestartup_script.py", "from comfy.cli_args import args"),
        ("__init__.py", "def f():\n    from .nodes import comfy_entrypoint"),
    ],
)
def test_allowed(path, source):
    assert violations(path, source) == []


@pytest.mark.parametrize(
    ("path", "source", "because"),
    [
        ("ops/caster.py", "import torch\nimport comfy.ops", "caster.py:2: comfy.ops: only nodes/"),
        ("ops/caster.py", "def f():\n    from comfy_api.latest import io", "may import ComfyUI"),
        ("patcher/policy.py", "if TYPE_CHECKING:\n    import server", "may import ComfyUI"),
        ("patcher/policy.py", "import folder_paths as fp", "may import ComfyUI"),
        ("cache/pressure.py", "import os, execution", "may import ComfyUI"),
        ("cache/pressure.py", "from nodes import NODE_CLASS_MAPPINGS", "may import ComfyUI"),
        ("cache/pressure.py", "importlib.import_module('comfy.utils')", "may import ComfyUI"),
        ("__init__.py", "from comfy_api.latest import ComfyExtension", "may import ComfyUI"),
        ("ops/caster.py", "from ..patcher import policy", "ops may import only ops"),
        ("ops/caster.py", "from .. import nodes", "ops may import only ops"),
        ("ops/comfyui/layers.py", "from ...cache.pressure import x", "ops may import only ops"),
        ("ops/caster.py", "import_module('..patcher', __package__)", "ops may import only ops"),
        ("patcher/dynamic.py", "from ..nodes import loaders", "patcher may import only ops, patcher"),
        ("patcher/dynamic.py", "from ..cache import pressure", "patcher may import only ops, patcher"),
        ("patcher/dynamic.py", "from .. import WEB_DIRECTORY", "patcher may import only ops, patcher"),
        ("cache/pressure.py", "from ..patcher.dynamic import models", "cache may import only cache, ops"),
        ("ops/caster.py", "from .comfyui.layers import x", "only from ComfyUI's side"),
        ("patcher/dynamic.py", "from ..ops import comfyui", "only from ComfyUI's side"),
        ("patcher/vbar/aimdo.py", "from ..comfyui.adapter import x", "only from ComfyUI's side"),
        ("patcher/__init__.py", "from . import comfyui", "only from ComfyUI's side"),
        ("nodes/loaders.py", "from ops.caster import borrow", "imported relatively"),
        ("patcher/dynamic.py", "import spillway.ops", "imported relatively"),
        ("patcher/dynamic.py", "__import__('cache')", "imported relatively"),
        ("ops/caster.py", "from ... import x", "leads out of the pack"),
    ],
)
def test_refused(path, source, because):
    (found,) = violations(path, source)
    assert because in found


def pack_imports() -> dict[str, set[str]]:
    """File -> files of the pack that it imports anywhere, also for types alone; a folder stands for its __init__.py."""
    files = set(pack_files())
    imports: dict[str, set[str]] = {}
    for path in files:
        parts = PurePosixPath(path).parts
        targets = set()
        for _, level, names in imported(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if not level:
                continue
            dotted = "/".join((*parts[: len(parts) - level], *names))
            above = dotted.rpartition("/")[0]
            targets |= files & {f"{dotted}.py", f"{dotted}/__init__.py", f"{above}.py", f"{above}/__init__.py"}
        imports[path] = targets - {path}
    return imports


def circle(imports: dict[str, set[str]]) -> list[str]:
    """The files of one import circle, or none."""
    done: set[str] = set()
    way: list[str] = []

    def visit(path: str) -> list[str]:
        if path in way:
            return [*way[way.index(path) :], path]
        if path in done:
            return []
        way.append(path)
        found = next((found for target in sorted(imports[path]) if (found := visit(target))), [])
        way.pop()
        done.add(path)
        return found

    return next((found for path in sorted(imports) if (found := visit(path))), [])


def test_there_is_no_import_circle():
    assert circle(pack_imports()) == []


def test_a_circle_is_found():
    assert circle({"a.py": {"b.py"}, "b.py": {"c.py"}, "c.py": {"b.py"}}) == ["b.py", "c.py", "b.py"]
