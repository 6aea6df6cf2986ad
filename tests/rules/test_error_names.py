"""What ComfyUI shows as an error's type says nothing of where the pack lies: the pack's exceptions have one base."""

import ast

from kit.pack import ROOT
from spillway.ops.device.backend import DeviceError
from spillway.ops.errors import NAME
from spillway.ops.files.watched_file import FileChanged

BASE = "SpillwayError"
ENDS = ("Error", "Exception", "Warning", "Interrupt")
# Caught by the function that has them raised, always.
INTERNAL = {"BadRequest", "NotStorable", "Stopped"}


def classes():
    """Every class of the pack, with the names of its bases."""
    for folder in ("ops", "patcher", "cache", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    yield node.name, [ast.unparse(base).rpartition(".")[2] for base in node.bases]


def test_every_exception_has_the_packs_name():
    bases = dict(classes())

    def is_one(name, wanted):
        return wanted(name) or any(is_one(base, wanted) for base in bases.get(name, ()))

    exceptions = {name for name in bases if name != BASE and is_one(name, lambda base: base.endswith(ENDS))}
    assert {"SourceError", "FileChanged", "NoFit", "Unsupported"} <= exceptions
    assert {name for name in exceptions if not is_one(name, BASE.__eq__)} == INTERNAL
    assert {FileChanged.__module__, DeviceError.__module__} == {NAME}
