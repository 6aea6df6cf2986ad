"""Pins give way to RAM pressure, outlive an unloading, and are worth more when they hold finished forms."""

import threading

import pytest
import torch
from nets import Stack, dynamic, plain, same, write
from sim_device import SimDevice

from spillway.patcher import ram_pressure

DEPTH = 8
ALL = 1 << 40
GIB = 1 << 30


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "m.safetensors"
    write(path, Stack(DEPTH))
    return path


@pytest.fixture
def ram(monkeypatch):
    """What the system has left, as the tests say."""
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
    assert ram_pressure.ease(models) == models[1].total_bytes  # a block as a whole
    assert [model.pinned_bytes > 0 for model in models] == [True, False, True]
    assert any("of pins back: RAM runs short" in text for text in models[1].ledger.decisions)
    ram["available"] = 64 * GIB
    assert same(run(models[1]), want)
    assert models[1].pinned_bytes == 0, "what was taken for lack of RAM must not be taken again at once"


def test_what_is_always_kept_keeps_its_pins(path, ram):
    kept, other = made(path, keep="always"), made(path, priority=-1)
    run(kept), run(other)
    ram["available"] = 0
    assert ram_pressure.ease([kept, other]) == other.total_bytes
    assert kept.pinned_bytes == kept.total_bytes


def test_without_pressure_nothing_goes(path, ram):
    model = made(path)
    run(model)
    assert ram_pressure.ease([model]) == 0 and model.pinned_bytes == model.total_bytes


def test_a_step_looks_at_the_pressure(path, ram):
    model = made(path)
    run(model)
    ram["available"] = 0
    assert same(run(model), expected(path))
    assert model.pinned_bytes == 0


def test_models_that_step_at_once_do_not_wait_for_each_other(path, ram):
    model = made(path)
    run(model)
    ram["available"] = 0
    freed = []
    with model.caster.lock:
        thread = threading.Thread(target=lambda: freed.append(ram_pressure.ease([model])), daemon=True)
        thread.start()
        thread.join(20)
        assert freed == [0], "it waited"
    assert ram_pressure.ease([model]) == model.total_bytes


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
