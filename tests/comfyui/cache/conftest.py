"""Fixtures of the tests of the output cache. They import ComfyUI when they are used: it may be missing."""

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
