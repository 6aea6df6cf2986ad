"""The output cache in the host's executor: what is kept, what goes, and whose cache is used."""

import asyncio
import json
import logging
import types

import comfy.model_patcher
import comfy_execution.cache_provider as providers
import execution
import folder_paths
import nodes
import pytest
import torch
from comfy.cli_args import args
from comfy_execution import caching

from spillway.cache import comfy_cache
from spillway.ops.available import Available

MIB = 1 << 20
RAN = []


class Server:
    client_id = None
    last_node_id = None

    def send_sync(self, *_):
        pass


def node_class(name, make, output=False, seconds=0.0, changed=None):
    class Node:
        RETURN_TYPES = ("*", "*")
        FUNCTION = "run"
        OUTPUT_NODE = output

        @classmethod
        def INPUT_TYPES(cls):
            return {"optional": {key: ("*", {}) for key in ("a", "b", "value")}}

        def run(self, **inputs):
            RAN.append((name, inputs.get("value")))
            return make(**inputs)

    if changed is not None:
        Node.IS_CHANGED = classmethod(lambda cls, **_: changed())
    return Node


def patcher(mib):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros(mib * MIB, dtype=torch.uint8), requires_grad=False)
    return comfy.model_patcher.ModelPatcher(module, torch.device("cpu"), torch.device("cpu"))


def tensor(mib):
    return torch.zeros(int(mib * MIB), dtype=torch.uint8)


class Sour(dict):
    def values(self):
        raise RuntimeError("not to be measured")


def strange():
    """The host itself looks into containers, but not into objects."""
    found = types.SimpleNamespace(sour=Sour(x=1), images=tensor(1))
    found.itself, found.loop = found, [found]
    return found


NODES = {
    "Load": node_class("Load", lambda value=0, **_: (patcher(40), "clip")),
    "Lora": node_class("Lora", lambda a=None, **_: (a.clone(), None)),
    "Encode": node_class("Encode", lambda **_: ([[tensor(1), {"pooled": tensor(1)}]], None)),
    "Sample": node_class("Sample", lambda **_: ({"samples": tensor(2)}, None)),
    "Decode": node_class("Decode", lambda **_: (tensor(10), None)),
    "Save": node_class("Save", lambda value="", **_: {"ui": {"text": [f"saved {value}"]}, "result": (None,)}, True),
    "Random": node_class("Random", lambda **_: (tensor(1), None), changed=lambda: float("nan")),
    "Strange": node_class("Strange", lambda **_: (strange(), object())),
}


def prompt(seed=1, text="a"):
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    return {
        "load": node("Load", value="model"),
        "lora": node("Lora", a=["load", 0], value=1.0),
        "text": node("Encode", a=["load", 1], value=text),
        "sample": node("Sample", a=["lora", 0], b=["text", 0], value=seed),
        "image": node("Decode", a=["sample", 0]),
        "save": node("Save", a=["image", 0], value=seed),
    }


class Executor:
    def __init__(self, cache_type="RAM_PRESSURE"):
        cache_args = {"lru": 100, "ram": 2.0, "ram_inactive": 64.0}
        self.real = execution.PromptExecutor(Server(), getattr(execution.CacheType, cache_type), cache_args)
        self.cache = self.real.caches.outputs
        self.count = 0

    def limit(self, mib, headroom=10):
        engine, total = self.cache.engine, mib * MIB
        engine.headroom = self.cache.base_headroom = headroom * MIB
        engine.available = lambda: Available(max(0, total - engine.ram_bytes()), total, "the test's memory")
        return engine

    def run(self, graph, output="save"):
        """What ran."""
        self.count += 1
        RAN.clear()
        asyncio.run(self.real.execute_async(graph, str(self.count), {"client_id": "me"}, [output]))
        assert self.real.success, self.real.status_messages
        return [name for name, _ in RAN]

    def kinds(self):
        return sorted(entry.kind for entry in self.cache.engine.entries.values())


@pytest.fixture(autouse=True)
def known_nodes(monkeypatch):
    for name, kind in NODES.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
    caching.NODE_CLASS_CONTAINS_UNIQUE_ID.clear()


@pytest.fixture
def installed(monkeypatch):
    for name in ("init_ram_cache", "init_classic_cache"):
        monkeypatch.setattr(execution.CacheSet, name, getattr(execution.CacheSet, name))
    monkeypatch.setattr(comfy_cache, "WORTH_ROOM", MIB)
    assert comfy_cache.install()


@pytest.fixture
def executor(installed):
    return Executor()


ALL = ["Load", "Lora", "Encode", "Sample", "Decode", "Save"]


# --- whose cache ------------------------------------------------------------------------------------------------------


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
    assert not comfy_cache.install()
    assert (execution.CacheSet.init_ram_cache, execution.CacheSet.init_classic_cache) == before
    assert len(caplog.records) == 1 and reason in caplog.text


def test_headroom_is_the_flags_else_a_tenth(installed, monkeypatch):
    monkeypatch.setattr(args, "cache_ram", [3.0, 5.0])
    cache = Executor().cache
    assert cache.engine.headroom == 3 << 30 and cache.inactive_headroom == 5 << 30
    monkeypatch.setattr(args, "cache_ram", [])
    monkeypatch.setattr(comfy_cache, "available_ram", lambda: Available(2 << 30, 40 << 30, "test"))
    cache = Executor().cache
    assert cache.engine.headroom == 4 << 30 and cache.inactive_headroom is None
    monkeypatch.setattr(args, "cache_ram", 6.0)  # versions before 0.25
    assert Executor().cache.engine.headroom == 6 << 30


# --- what is kept and what goes ---------------------------------------------------------------------------------------


def test_what_was_made_is_not_made_again(executor):
    assert sorted(executor.run(prompt())) == sorted(ALL)
    assert executor.run(prompt()) == []
    assert executor.run(prompt(seed=2)) == ["Sample", "Decode", "Save"]
    # Before 0.28 an output node of an earlier prompt runs again, or nobody would see its output.
    again = ["Save"] if comfy_cache.HISTORY_NEEDS_A_CLIENT else []
    assert executor.run(prompt(seed=1)) == again, "an earlier prompt's outputs are still there"


def test_results_are_those_of_the_hosts_own_cache(executor):
    def history(executor, seeds):
        found = []
        for seed in seeds:
            executor.run(prompt(seed))
            found.append(executor.real.history_result)
        return found

    seeds = [1, 2, 1, 1, 3, 2]
    executor.limit(70)
    wanted = [{"outputs": {"save": {"text": [f"saved {seed}"]}}} for seed in seeds]
    assert [{"outputs": one["outputs"]} for one in history(executor, seeds)] == wanted
    if not comfy_cache.HISTORY_NEEDS_A_CLIENT:
        assert history(executor, seeds) == history(Executor("LRU"), seeds)


def test_the_model_goes_mid_flow_and_what_was_made_of_it_stays(executor):
    executor.limit(64, headroom=14)
    executor.run(prompt())
    assert executor.cache.active_evictions
    assert executor.kinds() == ["Decode", "Encode", "Sample", "Save"]
    assert executor.run(prompt()) == []
    assert executor.run(prompt(seed=2)) == ["Load", "Lora", "Sample", "Decode", "Save"], "the text was still there"


def test_an_entry_goes_with_its_ui_and_history_stays(executor):
    executor.limit(200)
    executor.run(prompt())
    before = executor.real.history_result
    assert before["outputs"]["save"] == {"text": ["saved 1"]}
    executor.run(prompt())
    assert executor.real.history_result["outputs"]["save"] == {"text": ["saved 1"]}, "UI comes from the entry"
    executor.cache.engine.clear()
    assert not executor.cache.cache and before["outputs"]["save"] == {"text": ["saved 1"]}
    assert sorted(executor.run(prompt())) == sorted(ALL)


def test_room_is_made_before_a_node_runs(executor):
    """What a node took the last time is free before it runs again, and not only afterwards."""
    engine = executor.limit(1000)
    executor.run(prompt())
    for seed in range(2, 8):
        executor.run(prompt(seed))
    engine.forget(next(key for key, entry in engine.entries.items() if entry.kind == "Decode" and entry.used < 7))
    least = []
    real = engine.put
    engine.put = lambda *a, **k: (least.append(engine.available().available), real(*a, **k))[1]
    total = engine.ram_bytes() + 15 * MIB
    engine.available = lambda: Available(max(0, total - engine.ram_bytes()), total, "test")
    executor.run(prompt(seed=20))
    assert min(least[1:2]) >= 20 * MIB, "headroom and the 10 MiB of a decoded image"


def test_pending_nodes_keep_their_inputs(executor):
    engine = executor.limit(1000)
    needed = []
    real = NODES["Sample"].run

    def run(self, **inputs):
        needed.append({engine.entries[key].kind for key in executor.cache.needed() if key in engine.entries})
        return real(self, **inputs)

    NODES["Sample"].run = run
    try:
        executor.run(prompt())
    finally:
        NODES["Sample"].run = real
    assert needed == [{"Lora", "Encode"}], "the sampler reads these; the loader was read before"
    assert executor.cache.needed() == set()


def test_nodes_that_change_every_time_leave_nothing_behind(executor):
    for _ in range(5):
        graph = {
            "random": {"class_type": "Random", "inputs": {}},
            "save": {"class_type": "Save", "inputs": {"a": ["random", 0]}},
        }
        assert executor.run(graph) == ["Random", "Save"]
    assert executor.kinds() == ["Random", "Save"]


def test_strange_outputs_are_no_error(executor, caplog):
    graph = {
        "strange": {"class_type": "Strange", "inputs": {"value": 1}},
        "save": {"class_type": "Save", "inputs": {"a": ["strange", 0]}},
    }
    assert executor.run(graph) == ["Strange", "Save"] and executor.run(graph) == []
    assert caplog.text.count("cannot be measured") == 1


def test_the_hosts_own_release_calls(executor):
    engine = executor.limit(1000)
    executor.run(prompt())
    assert executor.cache.ram_release(1 << 40) == 0, "asked to drop what is inactive: RAM is not short"
    engine.available = lambda: Available(0, 1000 * MIB, "test")
    executor.cache._last_asked = 0.0
    assert executor.cache.ram_release(2 << 30, free_active=True, min_entry_size=512 * MIB) > 0
    assert not engine.entries


def test_external_providers_go_on_working(executor):
    class Provider(providers.CacheProvider):
        def __init__(self):
            self.stored, self.asked = {}, []

        async def on_lookup(self, context):
            self.asked.append(context.class_type)
            return self.stored.get(context.cache_key_hash)

        async def on_store(self, context, value):
            self.stored[context.cache_key_hash] = value

        def should_cache(self, context, value=None):
            return context.class_type == "Decode"

    provider = Provider()
    providers.register_cache_provider(provider)
    try:
        executor.run(prompt())
        assert len(provider.stored) == 1
        executor.cache.engine.clear()
        assert "Decode" not in executor.run(prompt()) and "Decode" in provider.asked
        assert "Decode" in executor.kinds(), "what a provider gave is counted too"
    finally:
        providers.unregister_cache_provider(provider)


def test_freed_caches_are_gone(executor):
    executor.run(prompt())
    executor.real.reset()
    assert comfy_cache.current() is executor.real.caches.outputs
    assert executor.real.caches.outputs is not executor.cache


# --- disk -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def user(monkeypatch, tmp_path):
    """A user folder with the disk tier on, and nodes that take long enough for it."""
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    settings = tmp_path / "default" / "comfy.settings.json"
    settings.parent.mkdir()
    settings.write_text(json.dumps({"Spillway.Cache.DiskGB": 1, "Spillway.Cache.DiskSeconds": 0}))
    return tmp_path


def written(user):
    return sorted(json.loads(path.read_text())["kind"] for path in (user / "__spillway" / "outputs").glob("*.json"))


def test_evicted_outputs_are_found_after_a_restart(installed, user):
    first = Executor()
    first.run(prompt())
    assert written(user) == []
    first.cache.engine.evict(1 << 60)
    assert written(user) == ["Decode", "Encode", "Sample"], "no models, and nothing that was shown"
    assert first.run(prompt()) == ["Save"]

    later = Executor()
    assert later.run(prompt()) == ["Save"]
    assert later.kinds() == ["Decode", "Save"], "nothing is read that nothing needs"
    wanted, found = (executor.cache.engine for executor in (first, later))
    (a,), (b,) = (
        [e.values[k].outputs[0][0] for k in e.values if e.entries[k].kind == "Decode"] for e in (wanted, found)
    )
    assert torch.equal(a, b)
    assert later.run(prompt(seed=2)) == ["Load", "Lora", "Sample", "Decode", "Save"], "its text was there"


def test_what_is_damaged_is_made_again(installed, user):
    first = Executor()
    first.run(prompt())
    first.cache.engine.evict(1 << 60)
    for path in (user / "__spillway" / "outputs").glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert sorted(Executor().run(prompt())) == sorted(ALL)


def test_the_disk_is_off_by_default(executor, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    executor.run(prompt())
    executor.cache.engine.evict(1 << 60)
    assert executor.cache.disk is None and list(tmp_path.iterdir()) == []
