"""Weights on a CPU, pins and staging mind what this process may have, and the ledger names the limit."""

import json
import re

import pytest
import torch

from kit.earlier_devices import forget
from kit.nets import DEPTH, Stack, dynamic
from kit.own_process import in_own_process
from kit.pack import ROOT
from kit.sim_device import SimDevice
from spillway.ops.ram import available
from spillway.ops.ram.available import Available
from spillway.ops.vbar import software
from spillway.patcher import ram_pressure

GIB = 1 << 30
LIMIT = "the cgroup's limit of 3.0 GiB"


@pytest.fixture
def ram(monkeypatch):
    """What this process may have, as the tests say: "free" bytes, less those that `held` counts."""
    state = {"free": 1 << 40, "held": lambda: 0}

    def recent():
        return Available(max(0, state["free"] - state["held"]()), 3 * GIB, LIMIT)

    for place in (available, ram_pressure.available):
        monkeypatch.setattr(place, "recent_ram", recent)
        monkeypatch.setattr(place, "available_ram", recent)
    monkeypatch.setattr("spillway.ops.device.backend.recent_ram", recent)
    monkeypatch.setattr(ram_pressure, "ram_reserve", lambda: 0)
    forget(torch.device("cpu"))  # what was seen of the RAM a moment ago
    return state


def cast(path, **policy):
    """A model whose weights are cast, so that all that is resident is memory of this process."""
    return dynamic(lambda: Stack(DEPTH), path, dtype=torch.float64, headroom_bytes=0, **policy)


def test_what_is_resident_on_a_cpu_stays_within_the_limit(path, ram):
    model = cast(path)
    ram["free"] = model.total_bytes // 2
    model(model.module.input())
    assert 0 < model.resident_bytes <= model.total_bytes // 2
    (line,) = [line for line in model.ledger.decisions if line.startswith("offloaded")]
    assert re.search(rf"free of {LIMIT}, 0 B headroom", line)


def test_a_budget_beyond_the_limit_does_not_overrule_it(path, ram):
    model = cast(path, vram_bytes=1 << 40)
    ram.update(free=model.total_bytes // 2, held=lambda: model.resident_bytes)  # it may be looked at again meanwhile
    model(model.module.input())
    assert model.resident_bytes <= model.total_bytes // 2


def test_the_machines_own_memory_is_not_named(path):
    model = cast(path)
    model(model.module.input())
    line = next(line for line in model.ledger.decisions if line.startswith("all "))
    assert available.available_ram().of_machine is (" of " not in line.partition(":")[2])


@pytest.mark.parametrize("counted", [True, False])
def test_weights_that_lie_in_their_file_count_once(path, ram, monkeypatch, counted):
    """Linux says that their pages are free. Where the system does not, they are no more to be had than others."""
    monkeypatch.setattr(available, "COUNTS_MAPPED_FILES", counted)
    monkeypatch.setattr(software, "_devices", {})  # models of earlier tests
    inside, outside = dynamic(lambda: Stack(DEPTH), path, headroom_bytes=0), cast(path)
    for model in (inside, outside):
        model(model.module.input())
        assert model.resident_bytes == model.total_bytes
    ram["free"] = 1000
    assert inside.residency.vbar.within_reach() == 1000 + (0 if counted else inside.total_bytes)
    assert outside.residency.vbar.within_reach() == 1000 + outside.total_bytes + (0 if counted else inside.total_bytes)


def test_pins_take_no_more_than_the_process_may_have(path, ram):
    model = dynamic(lambda: Stack(DEPTH), path, device=SimDevice(), vram_bytes=0, pinned_bytes=1 << 40)
    ram["free"], ram["held"] = model.total_bytes // 2, lambda: model.pinned_bytes
    model(model.module.input())
    assert 0 < model.pinned_bytes <= model.total_bytes // 2


def test_staging_shrinks_to_one_bundle_where_ram_is_short(path, ram):
    held = []
    for free in (1 << 40, 0):
        ram["free"] = free
        model = dynamic(lambda: Stack(DEPTH), path, device=SimDevice(), vram_bytes=0, pinned_bytes=0)
        model(model.module.input())
        held.append(model.caster.staging.capacity)
        model.close()
    assert held[1] == max(bundle.source_bytes for bundle in model.bundles) < held[0]


def test_pins_that_give_way_say_by_which_limit(path, ram, monkeypatch):
    monkeypatch.setattr(ram_pressure, "POLL_SECONDS", 0)
    model = dynamic(lambda: Stack(DEPTH), path, device=SimDevice(), vram_bytes=0, pinned_bytes=1 << 40)
    model(model.module.input())
    monkeypatch.setattr(ram_pressure, "ram_reserve", lambda: 2000)
    ram["free"] = 1000
    assert ram_pressure.relieve([model])
    assert model.ledger.decisions[-1].endswith(f"of pins back: RAM runs short ({LIMIT})")


# What a block of 256 MiB takes of the RAM that SPILLWAY_RAM_GB allows.
TAKES = """
import json
import kit.pack
import torch
from spillway.ops.device.backend import backend_for
from spillway.ops.ram import available

available.RECENT_SECONDS = 0
cpu = backend_for("cpu")
free, total = cpu.memory()
held = torch.ones(256 << 20, dtype=torch.uint8)
print(json.dumps([total, free - cpu.memory()[0], cpu.free_in_words()]))
"""


def test_the_variable_limits_a_cpu():
    """For real, with nothing in the place of the figures."""
    total, taken, words = json.loads(in_own_process(TAKES, SPILLWAY_RAM_GB="3"))
    assert total == 3 * GIB and 200 << 20 < taken < 300 << 20
    assert words.endswith("free of SPILLWAY_RAM_GB of 3.0 GiB")


def test_only_one_place_asks_the_system():
    asks = re.compile(r"virtual_memory|swap_memory|getrlimit|memory\.current|GlobalMemoryStatus")
    places = {
        path.relative_to(ROOT).as_posix()
        for folder in ("ops", "patcher", "cache", "nodes")
        for path in (ROOT / folder).rglob("*.py")
        if asks.search(path.read_text(encoding="utf-8"))
    }
    assert places == {"ops/ram/available.py", "ops/ram/cgroup.py", "ops/ram/process_limits.py"}
