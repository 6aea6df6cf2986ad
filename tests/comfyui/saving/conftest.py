"""Fixtures of the tests of saved models. They import ComfyUI when they are used: it may be missing."""

import os

import pytest


@pytest.fixture
def output(tmp_path, monkeypatch):
    import folder_paths

    from spillway.patcher.comfyui.saving.target import journal

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    yield tmp_path
    left = [path.name for path in tmp_path.rglob("*") if "spillway-" in path.name]
    assert not left and not (journal().is_dir() and os.listdir(journal()))


@pytest.fixture
def small_parts(monkeypatch):
    """Weights of the small models are large ones: they are made in several parts."""
    from spillway.ops.files import deferred

    monkeypatch.setattr(deferred, "PART_BYTES", 1 << 15)
