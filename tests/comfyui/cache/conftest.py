"""Fixtures of the tests of the output cache. They import ComfyUI when they are used: it may be missing."""

import json

import pytest


@pytest.fixture(autouse=True)
def known_nodes(monkeypatch):
    import nodes
    from comfy_execution import caching

    from kit.comfyui.executor import NODES

    for name, kind in NODES.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
    caching.NODE_CLASS_CONTAINS_UNIQUE_ID.clear()


@pytest.fixture
def installed(monkeypatch):
    import execution

    from kit.comfyui.executor import MIB
    from spillway.cache.comfyui import cache as comfy_cache
    from spillway.cache.comfyui import install as cache_install

    for name in ("init_ram_cache", "init_classic_cache"):
        monkeypatch.setattr(execution.CacheSet, name, getattr(execution.CacheSet, name))
    monkeypatch.setattr(comfy_cache, "WORTH_ROOM", MIB)
    assert cache_install.install()


@pytest.fixture
def executor(installed):
    from kit.comfyui.executor import Executor

    return Executor()


@pytest.fixture
def user(monkeypatch, tmp_path):
    """A user folder with the disk tier on, and nodes that take long enough for it."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    settings = tmp_path / "default" / "comfy.settings.json"
    settings.parent.mkdir()
    settings.write_text(json.dumps({"Spillway.Cache.DiskGB": 1, "Spillway.Cache.DiskSeconds": 0}))
    return tmp_path
