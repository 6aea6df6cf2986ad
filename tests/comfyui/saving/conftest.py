"""Fixtures of the tests of saved models."""

import os

import folder_paths
import pytest

from spillway.ops.files import deferred
from spillway.patcher.comfyui.saving.target import journal


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    yield tmp_path
    left = [path.name for path in tmp_path.rglob("*") if "spillway-" in path.name]
    assert not left and not (journal().is_dir() and os.listdir(journal()))


@pytest.fixture
def small_parts(monkeypatch):
    """Weights of the small models are large ones: they are made in several parts."""
    monkeypatch.setattr(deferred, "PART_BYTES", 1 << 15)
