"""Pins give way to RAM pressure, outlive an unloading, and are worth more when they hold finished forms."""

import sys
import threading
import time

import pytest
import torch

from kit.nets import DEPTH, Stack, dynamic, plain, same
from kit.sim_device import SimDevice
from spillway.ops import settings
from spillway.ops.ram import available
from spillway.patcher import ram_pressure

ALL = 1 << 40
GIB = 1 << 30


@pytest.fixture
def ram(monkeypatch):
    """What the system has left, as the tests say."""
    monkeypatch.setattr(ram_pressure, "POLL_SECONDS", 0)
    left = {"available": 64 * GIB}
    monkeypatch.setattr(ram_pressure, "available_ram", lambda: left["available"])
    return left


def made(path, **policy):
    return dynamic(lambda: Stack(DEPTH), path, device=SimDevice(), **{"vram_bytes": 0, "pinned_bytes": ALL, **policy})


def run(model):
    return model(model.module.input())


def expected(path, patch=lambda weight: weight):
    from safetensors.torch import load_file

    state = load_file(path)
    state = {key: patch(tensor) if key.endswith("weight") else tensor for key, tensor in state.items()}
    reference = plain(lambda: Stack(DEPTH), state, torch.float32)
    return reference(reference.input())


def patch_all(model, patch=torch.neg):
    model.set_patches({f"layers.{index}.weight": patch for index in range(DEPTH)})


def test_the_model_used_longest_ago_gives_its_pins_first(path, ram):
    models = [made(path) for _ in range(3)]
    want = expected(path)
    for model in models:
        assert same(run(model), want)
    models[0].last_used = 3e9  # it was used last
    short = models[0].total_bytes // 2
    ram["available"] = ram_pressure.ram_reserve() - short
    assert ram_pressure.relieve(models) == models[1].total_bytes  # a block as a whole
    assert [model.pinned_bytes > 0 for model in models] == [True, False, True]
    assert any("of pins back: RAM runs short" in text for text in models[1].ledger.decisions)
    ram["available"] = 64 * GIB
    assert same(run(models[1]), want)
    assert models[1].pinned_bytes == 0, "what was taken for lack of RAM must not be taken again at once"


def test_what_is_always_kept_keeps_its_pins(path, ram):
    kept, other = made(path, keep="always"), made(path, priority=-1)
    run(kept), run(other)
    ram["available"] = 0
    assert ram_pressure.relieve([kept, other]) == other.total_bytes
    assert kept.pinned_bytes == kept.total_bytes


def test_room_for_another_model_is_made_by_pins(path, ram):
    """Exactly where less than asked for is available, and no more than is short."""
    models = [made(path) for _ in range(2)]
    for model in models:
        run(model)
    held = [model.pinned_bytes for model in models]
    ram["available"] = 3000
    assert ram_pressure.free_ram(models, 3000) == 0 and [model.pinned_bytes for model in models] == held
    assert ram_pressure.free_ram(models, 3001) == held[0]
    assert [model.pinned_bytes for model in models] == [0, held[1]]
    assert any("of pins back: another model needs RAM" in text for text in models[0].ledger.decisions)


def test_without_pressure_nothing_goes(path, ram):
    model = made(path)
    run(model)
    assert ram_pressure.relieve([model]) == 0 and model.pinned_bytes == model.total_bytes


def test_a_step_looks_at_the_pressure(path, ram):
    model = made(path)
    run(model)
    ram["available"] = 0
    assert same(run(model), expected(path))
    assert model.pinned_bytes == 0


@pytest.fixture
def container(tmp_path, monkeypatch):
    """The system's files as in a container of 4 GiB: a function that says how much of that is in use."""
    group = tmp_path / "system/sys/fs/cgroup"
    proc = tmp_path / "system/proc/self"
    group.mkdir(parents=True)
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text("0::/\n")
    (proc / "mountinfo").write_text("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    (group / "memory.max").write_text(f"{4 * GIB}")
    for name in ("available_ram", "total_ram"):
        own = getattr(available, name)
        monkeypatch.setattr(available, name, lambda own=own: own(tmp_path / "system"))
    monkeypatch.setattr(ram_pressure, "POLL_SECONDS", 0)
    ram_pressure.ram_reserve.cache_clear()
    yield lambda used: (group / "memory.current").write_text(f"{used}")
    ram_pressure.ram_reserve.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="cgroups are Linux's")
def test_pins_respect_the_limit_of_a_container(path, container):
    """Whatever the machine has beside it."""
    container(1 * GIB)
    assert ram_pressure.ram_reserve() == GIB // 2, "a sixteenth of the container is less than that"
    model = made(path)
    assert same(run(model), expected(path)) and model.pinned_bytes == model.total_bytes
    container(3 * GIB + GIB // 2)  # just what is left to others
    assert same(run(model), expected(path)) and model.pinned_bytes == model.total_bytes
    container(3 * GIB + GIB // 2 + 1)
    assert same(run(model), expected(path)) and model.pinned_bytes == 0
    assert any("of pins back: RAM runs short" in text for text in model.ledger.decisions)


@pytest.mark.skipif(sys.platform != "linux", reason="cgroups are Linux's")
def test_the_default_budget_of_pins_is_of_the_container(path, container):
    container(3 * GIB + GIB // 2 - 1000)  # and what is left to others
    model = made(path, pinned_bytes=None)
    assert same(run(model), expected(path))
    assert model.pins.budget == 1000
    container(0)
    time.sleep(2 * available.RECENT_SECONDS)  # pins look no more often
    model.expect_use()
    assert same(run(model), expected(path))
    assert model.pins.budget >= model.total_bytes


def test_pins_respect_the_variable(path, monkeypatch):
    monkeypatch.setattr(ram_pressure, "POLL_SECONDS", 0)
    model = made(path)
    run(model)
    ram_pressure.ram_reserve()  # of this machine: it is worked out once
    monkeypatch.setenv("SPILLWAY_RAM_GB", str(available.process_bytes() / GIB))
    assert same(run(model), expected(path)) and model.pinned_bytes == 0


def test_a_malformed_variable_is_told_and_the_model_runs(path, monkeypatch, caplog):
    model = made(path, pinned_bytes=None)
    monkeypatch.setattr(settings, "_said", set())
    monkeypatch.setenv("SPILLWAY_RAM_GB", "much")
    assert same(run(model), expected(path))
    assert caplog.text.count("expected a number of gigabytes above 0") == 1


def test_the_look_is_taken_now_and_then(path, ram, monkeypatch):
    monkeypatch.setattr(ram_pressure, "POLL_SECONDS", 1e9)
    monkeypatch.setattr(ram_pressure, "_looked", time.monotonic())
    model = made(path)
    run(model)
    ram["available"] = 0
    run(model)
    assert model.pinned_bytes == model.total_bytes, "it has just been looked"
    monkeypatch.setattr(ram_pressure, "_looked", time.monotonic() - 1e9)
    run(model)
    assert model.pinned_bytes == 0


def test_models_that_step_at_once_do_not_wait_for_each_other(path, ram):
    model = made(path)
    run(model)
    ram["available"] = 0
    freed = []
    with model.caster.lock:
        thread = threading.Thread(target=lambda: freed.append(ram_pressure.relieve([model])), daemon=True)
        thread.start()
        thread.join(20)
        assert freed == [0], "it waited"
    assert ram_pressure.relieve([model]) == model.total_bytes


@pytest.mark.parametrize("patched", [False, True])
def test_pins_taken_in_the_middle_of_a_step(path, ram, patched):
    """As another thread does: between two layers, again and again."""
    model = made(path)
    if patched:
        patch_all(model)
    want = expected(path, torch.neg if patched else lambda weight: weight)
    for layer in model.module.layers[1::2]:
        layer.register_forward_hook(lambda *_: model.free_pins() and None)
    for _ in range(3):
        assert same(run(model), want)
    model.close()


def test_pins_outlive_an_unloading(path, ram):
    model = made(path)
    patch_all(model)
    want = expected(path, torch.neg)
    assert same(run(model), want) and same(run(model), want)
    counters = model.ledger.counters
    patched, read = counters.patched, counters.write_backs
    model.release(pins=False)
    assert model.resident_bytes == 0 and model.pinned_bytes == model.total_bytes
    assert same(run(model), want)
    assert (counters.patched, counters.write_backs) == (patched, read), "finished forms were made again"
    model.release()
    assert model.pinned_bytes == 0
    assert same(run(model), want)


def test_a_patch_that_changed_while_unloaded_is_not_taken_from_an_old_pin(path, ram):
    model = made(path)
    patch_all(model)
    run(model)
    model.release(pins=False)
    model.set_patches({})
    assert same(run(model), expected(path))


def test_finished_forms_displace_bytes_of_the_source(path, ram):
    model = made(path)
    model.set_policy(model.policy.with_changes(pinned_bytes=model.total_bytes // 2))
    run(model)
    assert model.caster.pins.used == model.total_bytes // 2
    some = {f"layers.{index}.weight": torch.neg for index in range(DEPTH - 3, DEPTH)}  # whose source is not pinned
    model.set_patches(some)
    run(model)
    patched = model.ledger.counters.patched
    run(model)
    assert model.ledger.counters.patched == patched, "a patch was computed again"
    assert model.pinned_bytes <= model.total_bytes // 2
