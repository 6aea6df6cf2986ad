"""The output cache in ComfyUI's executor: what is kept, and what goes."""

import comfy_execution.cache_provider as providers

from kit.comfyui.executor import ALL, MIB, NODES, Executor, prompt
from spillway.cache.comfyui import cache as comfy_cache
from spillway.cache.comfyui import install as cache_install
from spillway.ops.ram.available import Available


def test_what_was_made_is_not_made_again(executor):
    assert sorted(executor.run(prompt())) == sorted(ALL)
    assert executor.run(prompt()) == []
    assert executor.run(prompt(seed=2)) == ["Sample", "Decode", "Save"]
    # Before 0.28 an output node of an earlier prompt runs again, or nobody would see its output.
    again = ["Save"] if comfy_cache.HISTORY_NEEDS_A_CLIENT else []
    assert executor.run(prompt(seed=1)) == again, "an earlier prompt's outputs are still there"


def test_results_are_those_of_comfyuis_own_cache(executor):
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
    engine.drop(next(key for key, entry in engine.entries.items() if entry.kind == "Decode" and entry.used < 7))
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


def test_comfyuis_own_release_calls_free_only_when_ram_is_short(executor):
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
    assert cache_install.current_cache() is executor.real.caches.outputs
    assert executor.real.caches.outputs is not executor.cache
