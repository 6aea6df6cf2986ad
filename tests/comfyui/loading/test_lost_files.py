"""A node in which a model file is cut short while something reads it fails with the file's name. The next ones run."""

import os

import execution
import pytest
import torch
from safetensors.torch import save_file

from kit.comfyui.executor import Executor, node_class
from spillway.ops.files.disk_map import DiskMap
from spillway.ops.files.lost_pages import KNOWN
from spillway.patcher.comfyui import lost_files

pytestmark = pytest.mark.skipif(not KNOWN, reason="where nobody can cut a mapped file, or its signal is not handled")


@pytest.fixture
def cut(tmp_path, monkeypatch):
    """A node that reads a map of which the file is cut after all checks."""
    import nodes

    path = tmp_path / "cut.safetensors"

    def read(value=0, **_):
        save_file({"weight": torch.ones(2048, 1024)}, path)
        weight = DiskMap(path).tensor("weight")
        if value:
            os.truncate(path, 4096)
        return weight.sum(), None

    monkeypatch.setattr(execution, "get_output_data", execution.get_output_data)
    assert lost_files.install() and lost_files.install()
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Read", node_class("Read", read))
    save = node_class("Save", lambda **_: {"ui": {"text": ["saved"]}, "result": (None,)}, True)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Save", save)


def graph(value):
    return {
        "read": {"class_type": "Read", "inputs": {"value": value}},
        "save": {"class_type": "Save", "inputs": {"a": ["read", 0]}},
    }


def test_the_node_fails_and_keeps_nothing(cut):
    executor = Executor("CLASSIC")
    for _ in range(2):
        with pytest.raises(AssertionError, match=r"cut\.safetensors: a part of this file could not be read"):
            executor.run(graph(1))
    assert executor.run(graph(0)) == ["Read", "Save"]
