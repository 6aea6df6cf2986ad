"""The cap on cached outputs from a variable, a setting and a Cache Policy node, and the figures of a run."""

import json

import nodes as comfyui_nodes
import pytest

from kit.comfyui.executor import ALL, MIB, prompt
from spillway.nodes.memory_report import in_lines, memory_report
from spillway.nodes.policy import SpillwayCachePolicy

GIB = 1 << 30
CAP = 40 * MIB / GIB  # of what 64 MiB hold


def held_after_runs(executor, make=prompt):
    """The most that the cache held when a run had ended."""
    most = 0
    for seed in range(1, 5):
        executor.run(make(seed))
        most = max(most, executor.cache.engine.ram_bytes())
    return most


def with_policy(**policy):
    def make(seed):
        inputs = {"value": ["sample", 0], "headroom_gb": -1.0, "never_evict": False, "disk_gb": -1.0, **policy}
        return {**prompt(seed), "policy": {"class_type": "SpillwayCachePolicy", "inputs": inputs}}

    return make


def test_without_a_cap_all_is_held(executor):
    executor.limit(10_000)
    assert held_after_runs(executor) > 60 * MIB and executor.cache.engine.cap is None


@pytest.mark.parametrize("where", ["variable", "setting", "node"])
def test_no_more_than_the_cap_is_held(where, executor, user, monkeypatch):
    executor.limit(10_000)
    make = prompt
    settings = user / "default" / "comfy.settings.json"
    settings.write_text(json.dumps({"Spillway.Cache.RamGB": CAP} if where == "setting" else {}))
    if where == "variable":
        monkeypatch.setenv("SPILLWAY_CACHE_GB", str(CAP))
    if where == "node":
        monkeypatch.setitem(comfyui_nodes.NODE_CLASS_MAPPINGS, "SpillwayCachePolicy", SpillwayCachePolicy)
        SpillwayCachePolicy.GET_SCHEMA()
        make = with_policy(ram_gb=CAP)
    assert held_after_runs(executor, make) <= 40 * MIB
    assert executor.cache.engine.cap == int(CAP * GIB)
    assert any("the cap of 40.0 MiB on cached outputs" in line for line in executor.cache.engine.ledger.decisions)


def test_the_smallest_cap_holds_for_its_prompt_alone(executor, user, monkeypatch):
    (user / "default" / "comfy.settings.json").write_text(json.dumps({"Spillway.Cache.RamGB": 1}))
    monkeypatch.setitem(comfyui_nodes.NODE_CLASS_MAPPINGS, "SpillwayCachePolicy", SpillwayCachePolicy)
    SpillwayCachePolicy.GET_SCHEMA()
    executor.limit(10_000)
    for given, wanted in ((3.0, GIB), (0.5, GIB // 2), (-1.0, GIB)):
        executor.run(with_policy(ram_gb=given)(1))
        assert executor.cache.engine.cap == wanted
    executor.run(prompt())
    assert executor.cache.engine.cap == GIB
    with pytest.raises(ValueError, match="ram_gb"):
        SpillwayCachePolicy.execute("x", -1.0, False, -1.0, -0.5)


def test_the_figures_of_runs_are_in_the_report(executor):
    executor.limit(10_000)
    executor.run(prompt())
    run = executor.cache.engine.run
    assert (run.hits, run.misses) == (0, len(ALL)) and run.made_bytes > 50 * MIB and run.evictions == 0
    executor.run(prompt())
    run = executor.cache.engine.run
    assert (run.hits, run.misses) == (len(ALL), 0) and run.hit_bytes > 50 * MIB and run.saved_seconds > 0
    words = in_lines(memory_report())
    assert f"this run so far found {len(ALL)} outputs" in words and "a run before found 0 outputs" in words
