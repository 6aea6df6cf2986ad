"""A store that several ComfyUIs share, in ComfyUI's executor: what one has made no other makes again."""

import asyncio
import json
import time

import folder_paths
import nodes
import pytest
import torch
from comfy_execution import cache_provider as providers

from kit.comfyui import executor as kit
from kit.comfyui.executor import ALL, MIB, Executor, prompt
from kit.faulty_store import fresh_faults
from spillway.cache.comfyui import provider
from spillway.nodes.memory_report import in_lines, memory_report
from spillway.ops.files.file_state import MARK
from spillway.ops.ram.available import Available

pytestmark = pytest.mark.usefixtures("installed", "shared")


faults = pytest.fixture(autouse=True)(fresh_faults)


@pytest.fixture(autouse=True)
def unregistered():
    yield
    asyncio.run(provider.register(False))


def written(user):
    return sorted((user / "store").rglob("*.output"))


def picture(executor, kind="Decode"):
    engine = executor.cache.engine
    (found,) = (engine.values[key].outputs for key in engine.values if engine.entries[key].kind == kind)
    return found


def test_loaders_that_say_which_file_they_read_are_the_same_elsewhere(user, evict, monkeypatch):
    """What they say holds on one machine: a file that was copied has another time, and lies in another place."""
    states = iter(f"{MARK}{number}" for number in range(100))
    loader = kit.node_class("Load", lambda **_: (kit.patcher(40), "clip"), changed=lambda: next(states))
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Load", loader)
    first = Executor()
    first.run(prompt())
    evict(first)
    assert Executor().run(prompt()) == ["Save"]


def test_what_is_known_of_a_store_outlives_a_cache(user):
    """A place that does not answer would else be waited for anew whenever somebody frees all memory."""
    first = Executor()
    first.run(prompt())
    known = first.cache.sharing.store
    first.real.reset()
    first.cache = first.real.caches.outputs
    first.run(prompt())
    assert known is not None and first.cache.sharing.store is known


def test_another_machine_makes_nothing_again_and_reads_only_what_it_needs(user, evict):
    first = Executor()
    first.run(prompt())
    evict(first)
    assert len(written(user)) == 3, "no models, and nothing that was shown"
    second = Executor()
    assert second.run(prompt()) == ["Save"]
    assert second.kinds() == ["Decode", "Save"] and second.cache.sharing.store.counts.found == 1
    assert torch.equal(picture(second)[0][0], torch.zeros(10 * MIB, dtype=torch.uint8))
    third = Executor()
    assert third.run(prompt(seed=2)) == ["Load", "Lora", "Sample", "Decode", "Save"], "its text was there"
    evict(third)
    assert len(written(user)) == 5 and third.cache.sharing.store.counts.found == 1


def test_it_is_off_by_default_and_no_provider_is_registered(user, executor):
    (user / "default" / "comfy.settings.json").unlink()
    executor.run(prompt())
    assert not providers._has_cache_providers() and not written(user)
    assert memory_report()["store"] is None and "Shared store" not in in_lines(memory_report())


def test_the_variable_goes_before_the_setting_and_a_bad_key_turns_it_off(user, shared, monkeypatch, evict, caplog):
    (user / "other").mkdir()
    monkeypatch.setenv("SPILLWAY_STORE", f"file://{user}/other")
    first = Executor()
    first.run(prompt())
    evict(first)
    assert not written(user) and len(list((user / "other").rglob("*.output"))) == 3
    shared(Key="short")
    assert sorted(Executor().run(prompt())) == sorted(ALL) and "short" not in caplog.text
    assert "the shared store is off, as its key makes no sense" in caplog.text
    monkeypatch.setenv("SPILLWAY_STORE", "off")
    shared()
    last = Executor()
    last.run(prompt())
    evict(last)
    assert not written(user) and last.cache.sharing.store is None


def test_members_of_one_key_find_each_other_and_no_others(shared, evict):
    shared(Key="correct horse")
    first = Executor()
    first.run(prompt())
    evict(first)
    assert Executor().run(prompt()) == ["Save"]
    for other in ("another horse", ""):
        shared(Key=other)
        one = Executor()
        assert sorted(one.run(prompt())) == sorted(ALL)


def test_what_took_too_little_time_is_not_shared(user, shared, evict):
    shared(Seconds=5)
    first = Executor()
    first.run(prompt())
    evict(first)
    assert not written(user)


def test_machines_whose_folders_lie_elsewhere_agree(tmp_path, monkeypatch, evict):
    """The content of a file counts, and its last part, where a whole path is written out."""
    executors, prompts = [], []
    for name in ("here", "there"):
        folder = tmp_path / name
        (folder / "loras").mkdir(parents=True)
        (folder / "images").mkdir()
        for file in ("loras/style.safetensors", "images/a.png", "images/b.png"):
            (folder / file).write_bytes(file.encode())
        graph = prompt()
        graph["text"]["inputs"]["value"] = "style.safetensors"
        graph["sample"]["inputs"]["value"] = str(folder / "images")
        graph["image"]["inputs"]["value"] = str(folder / "images" / "a.png")
        prompts.append(graph)

    def run(number):
        extensions = folder_paths.folder_names_and_paths["loras"][1]
        place = [str(tmp_path / ("here", "there")[number] / "loras")]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", (place, extensions))
        executors.append(Executor())
        ran = executors[-1].run(prompts[number])
        evict(executors[-1])
        return ran

    assert len(run(0)) == 6 and run(1) == ["Save"]
    (tmp_path / "there" / "images" / "b.png").rename(tmp_path / "there" / "images" / "c.png")
    assert {"Sample", "Decode"} <= set(run(1)), "a folder is its files, with their names"
    (tmp_path / "there" / "loras" / "style.safetensors").write_bytes(b"another style, same name")
    assert "Encode" in run(1)


def test_a_node_that_writes_into_its_input_changes_nothing_that_is_shared(monkeypatch, evict, faults, shared):
    """What waits to be written is a copy of what was made."""

    def spoil(a=None, **_):
        a.fill_(7)
        return {"ui": {"text": ["x"]}, "result": (None,)}

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Save", kit.node_class("Save", spoil, True))
    shared(Address=f"faulty://{folder_paths.get_user_directory()}/store")
    faults.slow = 0.2
    first = Executor()
    first.run(prompt())
    assert int(picture(first)[0][0].max()) == 7
    evict(first)
    faults.slow = 0.0
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Save", kit.NODES["Save"])
    second = Executor()
    second.run(prompt())
    assert int(picture(second)[0][0].max()) == 0


def test_what_an_output_node_does_is_done_on_every_machine(user, monkeypatch, evict):
    """It may save a file, and hand its input on without a word to show."""
    save = kit.node_class("Save", lambda a=None, **_: (a, None), True)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Save", save)
    first = Executor()
    first.run(prompt())
    evict(first)
    assert len(written(user)) == 3 and Executor().run(prompt()) == ["Save"]


def test_others_providers_go_on_working(evict):
    """One before and one after ours. What another gave is not taken for what was made here."""

    class Provider(providers.CacheProvider):
        def __init__(self, gives=()):
            self.gives, self.asked, self.told = gives, [], []

        async def on_lookup(self, context):
            self.asked.append(context.class_type)
            if context.class_type in self.gives:
                return providers.CacheValue(outputs=[[{"samples": torch.ones(3)}], [None]])
            return None

        async def on_store(self, context, value):
            self.told.append(context.class_type)

    before, after = Provider(gives=("Sample",)), Provider()
    other = prompt(seed=10)
    other["image"]["inputs"]["value"] = "decoded otherwise"
    first = Executor()
    first.run(prompt(seed=10))
    first.cache.engine.clear()
    providers.register_cache_provider(before)
    try:
        # Ours goes where the settings turn it off, and comes back behind the other one.
        asyncio.run(provider.register(False))
        asyncio.run(provider.register(True))
        providers.register_cache_provider(after)
        assert first.run(other) == ["Decode", "Save"]
        evict(first)
        assert "Decode" in after.asked and "Decode" in before.asked and after.told
    finally:
        providers.unregister_cache_provider(before)
        providers.unregister_cache_provider(after)
    assert "Decode" in Executor().run(other), "it was made of what another had given"
    assert "Encode" not in Executor().run(prompt(seed=11))


def test_comfyuis_own_cache_is_left_alone(shared):
    """It does not say for which prompt it asks."""
    executor = Executor()
    executor.run(prompt())
    own = Executor("LRU")
    assert len(own.run(prompt())) == 6 and own.run(prompt(seed=2)) == ["Sample", "Decode", "Save"]


# --- a store that fails -----------------------------------------------------------------------------------------------


def tamper(path):
    path.write_bytes(path.read_bytes()[:-40] + b"x" * 40)


TROUBLE = {
    "read-only": lambda faults, _: setattr(faults, "read_only", True),
    "full": lambda faults, _: setattr(faults, "full", True),
    "5 s slower": lambda faults, _: setattr(faults, "slow", 5.0),
    "hanging": lambda faults, _: faults.hangs.set(),
    "broken": lambda faults, _: setattr(faults, "broken", RuntimeError("no credentials")),
    "gone": lambda _, store: store.rename(store.with_name("elsewhere")),
    "tampered": lambda _, store: [tamper(path) for path in store.rglob("*.output")],
}
FOUND = ("read-only", "full")  # what can be read is read


@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_store_that_fails_costs_no_more_than_the_limit(user, shared, faults, trouble, evict):
    answers = trouble in ("tampered", *FOUND)
    shared(Address=f"far://{user}/store", WaitSeconds=30 if answers else 0.5)
    first = Executor()
    first.run(prompt())
    evict(first)
    TROUBLE[trouble](faults, user / "store")
    second = Executor()
    times = []
    for seed in (1, 2, 3):
        begun = time.monotonic()
        ran = second.run(prompt(seed=seed))
        times.append(time.monotonic() - begun)
        assert ("Sample" in ran) == (seed > 1 or trouble not in FOUND), ran
        assert torch.equal(picture(second)[0][0], torch.zeros(10 * MIB, dtype=torch.uint8))
        second.cache.engine.clear()
        left_alone = seed > 1 and trouble in ("5 s slower", "hanging")
        assert answers or second.cache.sharing.store.waiting.spent <= (0.0 if left_alone else 1.0)
    assert max(times) < 4.0, "less than one answer takes"
    told = memory_report()["store"]
    if trouble == "tampered":
        assert told["refused"] >= 3
    else:
        assert told["refused"] == 0 and bool(told["found"]) == (trouble in FOUND)


def test_what_waits_to_be_written_is_bounded_and_gives_way_to_ram(user, shared, faults, monkeypatch):
    shared(Address=f"faulty://{user}/store")
    faults.hangs.set()
    shared(Address=f"faulty://{user}/store", WaitSeconds=0)
    executor = Executor()
    engine = executor.limit(1000)
    executor.run(prompt())
    writer = executor.cache.sharing.writer
    assert writer.nbytes == 14 * MIB
    engine.available = lambda: Available(
        1000 * MIB - engine.ram_bytes() - writer.nbytes, 1000 * MIB, "the test's memory"
    )
    engine.relieve(995 * MIB)
    assert writer.nbytes <= 10 * MIB and writer.dropped, "as much as is short"
    faults.hangs.clear()
    assert writer.wait(60)


def test_the_report_and_the_debug_log_say_what_it_did(caplog, evict, user):
    caplog.set_level("DEBUG")
    first = Executor()
    first.run(prompt())
    evict(first)
    first.run(prompt())
    told = memory_report()["store"]
    assert told["written"] == 3 and told["address"] == f"file://{user}/store" and json.dumps(told)
    assert f"file://{user}/store: found 1 outputs" in in_lines(memory_report())
    Executor().run(prompt())
    first.run(prompt())
    assert "wrote 3" in caplog.text and "missed" in caplog.text
