"""What stays free beside comfy-aimdo's VBARs, and what the ledger says of it."""

import dataclasses
import re

import pytest
import torch

from cuda_sim.aimdo import HEADROOM, PAGE
from kit.nets import Stack, dynamic, plain, same, write


def build():
    """Twelve bundles of half a page."""
    return Stack(12, 2040)


@pytest.fixture
def made(tmp_path, device):
    path = tmp_path / "m.safetensors"
    reference = plain(build, write(path, build()), build().layers[0].weight.dtype)
    expected = reference(reference.input())

    def make(headroom_pages):
        return dynamic(build, path, device=device, pinned_bytes=0, headroom_bytes=HEADROOM + headroom_pages * PAGE)

    return make, expected


def offloaded_in_words(model):
    found = re.search(r"offloaded (\d+) of", model.ledger.decisions[-1])
    return int(found[1]) if found else 0


@pytest.mark.parametrize("pages", [0, 4, 7, 20])
def test_the_headroom_stays_free_and_the_ledger_is_true(machine, device, made, pages):
    make, expected = made
    machine.leave_pages(10)
    model = make(pages)
    for _ in range(3):
        assert same(model(model.module.input()), expected)
        free = device.memory()[0] - HEADROOM + model.buffer_bytes - model.plan.reserve
        assert model.resident_bytes == 0 or free >= pages * PAGE
    assert model.vbar_kind == "aimdo"
    assert sum(not resident for _, _, resident in model.bundle_report()) == offloaded_in_words(model)
    assert (model.resident_bytes > 0) == (pages < 10)
    model.close()


def test_the_headroom_follows_what_others_take_and_give_back(machine, device, made):
    make, expected = made
    model = make(2)
    seen = []
    for pages in (12, 6, 12):
        machine.leave_pages(12)
        held = model.resident_bytes // PAGE
        machine.leave_pages(pages - held if pages > held else 0)
        for _ in range(2):
            assert same(model(model.module.input()), expected)
        seen.append(model.resident_bytes // PAGE)
    assert seen[0] == seen[2] == 6 > seen[1]
    model.close()


def test_a_model_that_takes_turns_counts_on_what_gives_way(machine, device, made):
    """Another model's weights are no reason to stream: they give way to the model that runs."""
    make, expected = made
    machine.leave_pages(9)
    one, two = make(1), make(1)
    for model in (one, two, one, two):
        assert same(model(model.module.input()), expected)
        assert model.resident_bytes == 6 * PAGE
    one.close(), two.close()


def test_an_estimate_costs_nothing_where_allocations_are_seen(machine, device, made):
    """comfy-aimdo gives way when the computation allocates, so no page goes beforehand only to be brought again."""
    make, expected = made
    machine.leave_pages(10)
    model = make(0)
    assert same(model(model.module.input()), expected)
    held, loaded = model.resident_bytes, model.ledger.counters.bytes_loaded
    model.expect_use(8 * PAGE)
    assert model.resident_bytes == held
    assert same(model(model.module.input()), expected)
    assert model.ledger.counters.bytes_loaded == loaded
    model.close()


class Needy(torch.nn.Module):
    """Its sixth layer computes in memory of its own."""

    def __init__(self, device, pages):
        super().__init__()
        self.stack, self.device, self.pages = build(), device, pages

    def input(self):
        return self.stack.input()

    def forward(self, x):
        for index, layer in enumerate(self.stack.layers):
            memory = self.device.empty(self.pages * PAGE) if index == 5 else None
            x = layer(x)
            del memory
            if index == 5:
                self.device.drop_cached()
        return x


def test_a_computation_that_takes_the_weights_place_is_learnt_from(machine, device, tmp_path):
    """Else weights that it evicts in each step would be read from their file in each step, as what stays has no pin."""
    path = tmp_path / "m.safetensors"
    write(path, Needy(device, 0))
    machine.leave_pages(9)
    model = dynamic(lambda: Needy(device, 4), path, device=device, headroom_bytes=HEADROOM)
    wanted, moved = None, []
    for _ in range(7):
        before = dataclasses.replace(model.ledger.counters)
        got = model(model.module.input())
        wanted = got if wanted is None else wanted
        assert same(got, wanted)
        now = model.ledger.counters
        moved.append((now.bytes_loaded - before.bytes_loaded, now.bytes_streamed - before.bytes_streamed))
    stays = model.resident_bytes
    assert stays > 0
    assert moved[-3:] == [(0, moved[-1][1])] * 3, moved
    assert moved[-1][1] <= model.total_bytes - stays + PAGE, moved
    offloaded = [bundle for bundle in model.bundles if not model.residency.is_resident(bundle)]
    assert all(model.pins.holds(bundle) for bundle in offloaded), "none is read again"
    model.close()


def test_what_was_freed_is_not_learnt_from(machine, device, made):
    """Else a model would not come back to the device after a user freed it, or another model had its place."""
    make, expected = made
    machine.leave_pages(8)
    model = make(1)
    for _ in range(3):
        assert same(model(model.module.input()), expected)
    held = model.resident_bytes
    assert held > 0 and model.free()
    for _ in range(3):
        assert same(model(model.module.input()), expected)
    assert model.resident_bytes == held
    model.close()
