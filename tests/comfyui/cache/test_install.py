"""Whose output cache an executor gets, and with what headroom."""

import json
import logging
import os

import execution
import folder_paths
import pytest
from comfy.cli_args import args
from comfy_execution import caching

from kit.comfyui.executor import Executor
from spillway.cache.comfyui import cache as comfy_cache
from spillway.cache.comfyui import install as cache_install
from spillway.cache.comfyui import settings as comfy_settings
from spillway.ops.ram.available import Available


def test_the_default_is_ours_and_flags_are_respected(installed, monkeypatch):
    assert isinstance(Executor().cache, comfy_cache.SpillwayCache)
    assert type(Executor("LRU").cache) is caching.LRUCache
    assert type(Executor("NONE").cache) is caching.NullCache
    # Older versions come to the classic cache without a flag.
    assert isinstance(Executor("CLASSIC").cache, comfy_cache.SpillwayCache)
    monkeypatch.setattr(args, "cache_classic", True, raising=False)
    assert type(Executor("CLASSIC").cache) is caching.HierarchicalCache


def test_the_variable_and_the_setting_turn_it_off(installed, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    settings = tmp_path / "default" / "comfy.settings.json"
    settings.parent.mkdir()
    settings.write_text(json.dumps({"Spillway.Cache.Enabled": False}))
    assert type(Executor().cache) is caching.RAMPressureCache and "turned off in the settings" in caplog.text
    monkeypatch.setenv("SPILLWAY_CACHE", "1")
    assert isinstance(Executor().cache, comfy_cache.SpillwayCache)
    monkeypatch.setenv("SPILLWAY_CACHE", "0")
    settings.unlink()
    assert type(Executor().cache) is caching.RAMPressureCache and "SPILLWAY_CACHE=0" in caplog.text
    monkeypatch.delenv("SPILLWAY_CACHE")
    settings.write_text("{ damaged")
    assert isinstance(Executor().cache, comfy_cache.SpillwayCache) and "cannot be read" in caplog.text


def test_settings_that_are_just_being_written_are_read_when_they_are_there(monkeypatch, tmp_path, caplog):
    """ComfyUI empties its file, and then writes it."""
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    path = tmp_path / "default" / "comfy.settings.json"
    path.parent.mkdir()
    path.write_text("")
    waited = []

    def write(seconds):
        waited.append(seconds)
        path.write_text('{"Spillway.Cache.RamGB": ' if len(waited) == 1 else '{"Spillway.Cache.RamGB": 3}')

    monkeypatch.setattr(comfy_settings.time, "sleep", write)
    assert comfy_settings.ram_cap() == 3 << 30
    assert len(waited) == 2 and not caplog.text
    # One that has been damaged for a while holds nobody up.
    path.write_text("{ damaged")
    os.utime(path, (1, 1))
    assert comfy_settings.ram_cap() is None and len(waited) == 2


@pytest.mark.parametrize(
    ("where", "name", "value", "reason"),
    [
        (execution.CacheSet, "init_ram_cache", lambda self, headroom, more: None, "takes other arguments"),
        (execution, "CacheEntry", tuple, "other fields"),
        (caching.RAMPressureCache, "ram_release", lambda self, target, wanted: 0, "ram_release takes other"),
        (caching.RAMPressureCache, "shrink", lambda self: None, "it asks for shrink"),
    ],
)
def test_an_unknown_executor_is_left_alone(monkeypatch, caplog, where, name, value, reason):
    monkeypatch.setattr(where, name, value, raising=False)
    before = execution.CacheSet.init_ram_cache, execution.CacheSet.init_classic_cache
    assert not cache_install.install()
    assert (execution.CacheSet.init_ram_cache, execution.CacheSet.init_classic_cache) == before
    assert len(caplog.records) == 1 and reason in caplog.text


def test_headroom_is_the_flags_else_a_tenth(installed, monkeypatch):
    monkeypatch.setattr(args, "cache_ram", [3.0, 5.0])
    cache = Executor().cache
    assert cache.engine.headroom == 3 << 30 and cache.inactive_headroom == 5 << 30
    monkeypatch.setattr(args, "cache_ram", [])
    monkeypatch.setattr(cache_install, "available_ram", lambda: Available(2 << 30, 40 << 30, "test"))
    cache = Executor().cache
    assert cache.engine.headroom == 4 << 30 and cache.inactive_headroom is None
    monkeypatch.setattr(args, "cache_ram", 6.0)  # versions before 0.25
    assert Executor().cache.engine.headroom == 6 << 30
