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


def settings_of(tmp_path, tier):
    """The settings with which that tier takes what nodes make, however fast."""
    if tier == "disk":
        return {"Spillway.Cache.DiskGB": 1, "Spillway.Cache.DiskSeconds": 0}
    (tmp_path / "store").mkdir(exist_ok=True)
    return {"Spillway.Store.Address": f"file://{tmp_path}/store", "Spillway.Store.Seconds": 0}


@pytest.fixture
def evict():
    """Have an executor keep its outputs in the tier alone."""

    def evict(executor):
        executor.cache.engine.evict(1 << 60)
        assert executor.cache.engine.writer.wait(60) and executor.cache.sharing.writer.wait(60)

    return evict


@pytest.fixture(params=["disk", "store"])
def tier(request, user):
    """Where evicted outputs are found again: on this machine's disk, or in a shared store."""
    settings = user / "default" / "comfy.settings.json"
    settings.write_text(json.dumps(settings_of(user, request.param)))
    return request.param


@pytest.fixture
def shared(user):
    """Settings of a shared store, and a function that changes them."""
    settings = user / "default" / "comfy.settings.json"

    def change(**options):
        told = settings_of(user, "store") | {f"Spillway.Store.{name}": value for name, value in options.items()}
        settings.write_text(json.dumps(told))

    change()
    return change


@pytest.fixture
def user(monkeypatch, tmp_path):
    """A user folder with the disk tier on, and nodes that take long enough for it."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    settings = tmp_path / "default" / "comfy.settings.json"
    settings.parent.mkdir()
    settings.write_text(json.dumps(settings_of(tmp_path, "disk")))
    return tmp_path
