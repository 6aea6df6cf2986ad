"""The output cache: what it counts, what it evicts when RAM is short, and what it keeps."""

import threading

import pytest
import torch

from spillway.cache.holdings import never_equal
from spillway.cache.measure import Model, module_bytes
from spillway.cache.output_cache import OutputCache
from spillway.ops.ram.available import Available

MIB = 1 << 20


class Patcher:
    def __init__(self, model, patch=None):
        self.model, self.patch = model, patch


def getter(value):
    if not isinstance(value, Patcher):
        return None
    return Model(value.model, lambda: module_bytes(value.model), [value.patch])


def model(mib):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros(mib * MIB, dtype=torch.uint8), requires_grad=False)
    return module


def tensor(mib):
    return torch.zeros(int(mib * MIB), dtype=torch.uint8)


class Machine:
    """RAM of which only the cache takes."""

    def __init__(self, mib, headroom=10, **options):
        self.cache = OutputCache(
            headroom * MIB, getters=[getter], available=self.available, entry_bytes=1024, **options
        )
        self.total = mib * MIB

    def available(self):
        return Available(max(0, self.total - self.cache.ram_bytes()), self.total, "the test's memory")

    def relieve(self, needed=()):
        return self.cache.relieve(self.cache.headroom, lambda: needed)


def put(cache, key, *outputs, seconds=1.0, kind=None, parents=()):
    return cache.put(key, outputs, outputs, seconds=seconds, kind=kind or str(key), parents=parents)


def test_nothing_goes_while_there_is_room():
    machine = Machine(100)
    for i in range(8):
        put(machine.cache, i, tensor(10))
    assert machine.relieve() == 0 and len(machine.cache.values) == 8
    put(machine.cache, 8, tensor(10))
    assert machine.relieve() >= 10 * MIB and len(machine.cache.values) == 8


def test_shared_memory_counts_once_and_is_freed_with_the_last():
    cache = Machine(1000).cache
    image = tensor(10)
    put(cache, "load", image)
    put(cache, "reroute", image)
    assert cache.ram_bytes() == 10 * MIB + 2 * 1024
    cache.drop("load")
    assert cache.ram_bytes() == 10 * MIB + 1024
    cache.drop("reroute")
    assert cache.ram_bytes() == 0


def test_shares_always_add_up():
    """Whatever comes and goes, the shares of all entries are the bytes that are held."""
    cache, images = Machine(1000).cache, [tensor(i) for i in range(1, 6)]
    for step in range(60):
        put(cache, step % 13, *(images[i] for i in range(5) if (step >> i) & 1 or i == step % 5))
        if step % 7 == 3:
            cache.drop((step * 5) % 13)
        held = cache.ram_bytes() - len(cache.values) * 1024
        assert sum(entry.share for entry in cache.entries.values()) == pytest.approx(held)


def test_a_chain_that_shares_a_model_goes_together():
    machine = Machine(200)
    cache, shared = machine.cache, model(100)
    cache.begin_prompt([])
    put(cache, "loader", Patcher(shared), seconds=5)
    put(cache, "lora", Patcher(shared, tensor(2)), seconds=1, parents=["loader"])
    put(cache, "encoding", tensor(1), seconds=0.5, parents=["loader"])
    put(cache, "image", tensor(30), seconds=20, parents=["lora"])
    del shared
    candidates = cache.candidates()
    (place,) = [place for place, entries in enumerate(candidates.entries) if len(entries) == 2]
    assert {entry.key for entry in candidates.entries[place]} == {"loader", "lora"}
    assert candidates.seconds[place] == 6 and candidates.freed[place] == 102 * MIB + 2 * 1024
    put(cache, "next", tensor(70), seconds=9)
    machine.relieve(needed=["next"])
    assert set(cache.values) == {"encoding", "image", "next"}, "the model went mid-flow, and what was made of it stayed"


def test_an_old_lora_goes_while_the_model_stays():
    machine = Machine(130)
    cache, shared = machine.cache, model(90)
    cache.begin_prompt([])
    put(cache, "loader", Patcher(shared), seconds=5)
    put(cache, "lora 1", Patcher(shared, tensor(20)), parents=["loader"])
    cache.begin_prompt(["loader"])
    put(cache, "lora 2", Patcher(shared, tensor(20)), parents=["loader"])
    machine.relieve()
    assert set(cache.values) == {"loader", "lora 2"}


def test_needed_entries_stay_until_nothing_else_can_go():
    machine = Machine(100)
    put(machine.cache, "input", tensor(60), seconds=0.01)
    put(machine.cache, "dear", tensor(35), seconds=100)
    machine.relieve(needed=["input"])
    assert set(machine.cache.values) == {"input"}
    machine.total = 20 * MIB
    machine.relieve(needed=["input"])
    assert not machine.cache.values


def test_protected_entries_stay_whatever_happens():
    machine = Machine(50)
    kept = tensor(45)
    put(machine.cache, "kept", kept, seconds=0)
    assert machine.cache.protect([kept]) == 45 * MIB
    put(machine.cache, "other", tensor(1), seconds=100)
    machine.relieve()
    assert set(machine.cache.values) == {"kept"}
    machine.cache.protect([kept], keep=False)
    machine.relieve()
    assert not machine.cache.values


def test_lost_parents_make_children_dearer():
    cache = Machine(1000).cache
    put(cache, "loader", Patcher(model(100)), seconds=30)
    put(cache, "frames", tensor(10), seconds=1, parents=["loader"])

    def seconds():
        candidates = cache.candidates()
        (place,) = [i for i, entries in enumerate(candidates.entries) if entries[0].key == "frames"]
        return candidates.seconds[place]

    assert seconds() == 1
    cache._evict(cache.entries["loader"])
    assert seconds() == 31
    put(cache, "loader", Patcher(model(100)), seconds=30)
    assert seconds() == 1


def test_kinds_learn_whether_they_are_used_again():
    cache = Machine(1000).cache
    for prompt in range(20):
        cache.begin_prompt(["loader"] if prompt else [])
        if not prompt:
            put(cache, "loader", tensor(1), kind="Loader")
        put(cache, f"image {prompt}", tensor(1), kind="Sampler")
    assert cache.kinds["Loader"].chance == 1.0
    assert cache.kinds["Sampler"].chance == pytest.approx(1 / 21)


def test_expected_bytes_are_those_of_the_key_else_of_the_kind():
    cache = Machine(1000).cache
    assert cache.expected_bytes("a", "Load") == 0
    put(cache, "a", tensor(40), kind="Load")
    put(cache, "b", tensor(5), kind="Load")
    cache._evict(cache.entries["a"])
    assert cache.expected_bytes("a", "Load") == 40 * MIB
    assert cache.expected_bytes("c", "Load") == 5 * MIB


def test_keys_unlike_themselves_go_with_their_prompt():
    nan = frozenset([(0, float("nan")), (1, "Random")])
    assert never_equal(nan) and never_equal((1, [nan])) and not never_equal(frozenset([(0, 1.5)]))
    cache = Machine(1000).cache
    cache.begin_prompt([nan])
    put(cache, nan, tensor(1))
    put(cache, "plain", tensor(1))
    assert nan in cache.values
    cache.begin_prompt([])
    assert set(cache.values) == {"plain"}


def test_too_many_entries_go_too(monkeypatch):
    monkeypatch.setattr("spillway.cache.output_cache.MAX_ENTRIES", 50)
    machine = Machine(1000)
    for i in range(60):
        put(machine.cache, i, None)
    machine.relieve()
    assert len(machine.cache.values) == 50


def test_decisions_say_what_went_and_why():
    machine = Machine(20)
    put(machine.cache, "image", tensor(15), kind="VAEDecode")
    machine.relieve()
    assert "evicted 1 outputs (VAEDecode), 15.0 MiB" in machine.cache.ledger.decisions[-1]
    assert "the test's memory" in machine.cache.ledger.decisions[-1]
    figures = machine.cache.as_dict()
    assert figures["evicted_entries"] == 1 and figures["ram_bytes"] == 0


def test_an_eviction_that_cannot_be_kept_is_no_error():
    def broken(entry, value, nbytes):
        raise OSError("disk full")

    machine = Machine(20, on_evict=broken)
    put(machine.cache, "image", tensor(15))
    machine.relieve()
    assert not machine.cache.values
    assert any("disk full" in text for text in machine.cache.ledger.decisions)


def test_memory_that_others_hold_empties_nothing_twice():
    """What is freed does not show, as somebody else takes it: no more rounds than there are."""
    cache = OutputCache(10 * MIB, available=lambda: Available(0, 100 * MIB, "others"), entry_bytes=0)
    for i in range(100):
        cache.put(i, tensor(1), [tensor(1)])
    cache.relieve(cache.headroom)
    assert len(cache.values) == 70  # three rounds of the 10 MiB that are short


def test_many_threads():
    machine = Machine(60)
    errors = []

    def work(number):
        try:
            for i in range(100):
                put(machine.cache, (number, i % 20), tensor(0.5))
                machine.cache.values.get((number, (i * 7) % 20))
                machine.relieve()
                machine.cache.as_dict()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    machine.cache.clear()
    assert machine.cache.ram_bytes() == 0 and not machine.cache.holdings.holders and not machine.cache.values
