"""The four cases of a loan, by what they move and compute; and the limits that the caster keeps while it does."""

import pytest
import torch
from safetensors.torch import load_file

from kit.nets import Stack, dynamic, plain, same, write
from kit.sim_device import SimDevice
from spillway.ops.files.source import StateDict
from spillway.ops.lending.write_backs import WriteBacks

DEPTH = 6
ALL = 1 << 40


def build():
    return Stack(DEPTH)


def gain(weight):
    return weight * 1.5


def patches(model):
    return {f"layers.{index}.weight": gain for index in range(DEPTH)}


def step(model):
    """One forward; what the counters gained."""
    before = vars(model.ledger.counters).copy()
    model(model.module.input())
    return {name: value - before[name] for name, value in vars(model.ledger.counters).items()}


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "m.safetensors", build())
    return tmp_path / "m.safetensors"


# Devices with their own memory. Without look-ahead, so that a step's numbers are its own.


def test_resident_and_current_moves_and_computes_nothing(path):
    model = dynamic(build, path, device=SimDevice(), prefetch=0)
    model.set_patches(patches(model))
    step(model)
    copies = model.backend.copies
    gained = step(model)
    assert gained["hits"] == gained["faults"] == DEPTH
    assert gained["bytes_loaded"] == gained["bytes_streamed"] == gained["patched"] == 0
    assert model.backend.copies == copies


def test_resident_but_stale_is_brought_and_patched_once(path):
    model = dynamic(build, path, device=SimDevice(), prefetch=0)
    first = step(model)
    assert first["bytes_loaded"] == model.total_bytes
    assert first["hits"] == first["patched"] == first["misses"] == 0
    model.set_patches({"layers.2.weight": gain})
    stale = step(model)
    assert stale["bytes_loaded"] == model.bundles[2].source_bytes
    assert stale["patched"] == 1
    assert stale["hits"] == DEPTH - 1


@pytest.mark.parametrize("patched", [False, True])
def test_no_room_but_a_current_pin_is_one_transfer_of_the_finished_bundle(path, patched):
    model = dynamic(build, path, device=SimDevice(), prefetch=0, vram_bytes=0, pinned_bytes=ALL)
    if patched:
        model.set_patches(patches(model))
    first = step(model)
    assert first["patched"] == first["write_backs"] == patched * DEPTH
    copies = model.backend.copies
    gained = step(model)
    assert gained["misses"] == DEPTH
    assert gained["bytes_streamed"] == model.total_bytes
    assert gained["patched"] == gained["write_backs"] == gained["bytes_loaded"] == 0
    assert model.backend.copies == copies + DEPTH


@pytest.mark.parametrize("patched", [False, True])
def test_no_room_and_no_pin_is_brought_and_patched_every_time(path, patched):
    model = dynamic(build, path, device=SimDevice(), prefetch=0, vram_bytes=0, pinned_bytes=0)
    if patched:
        model.set_patches(patches(model))
    for _ in range(3):
        gained = step(model)
        assert gained["bytes_streamed"] == model.total_bytes
        assert gained["patched"] == patched * DEPTH
        assert gained["write_backs"] == gained["bytes_loaded"] == 0
    assert model.pinned_bytes == 0


@pytest.mark.parametrize(("pinned_bytes", "reads_again"), [(ALL, False), (0, True)])
def test_a_pinned_bundle_is_not_read_from_its_source_again(path, pinned_bytes, reads_again):
    state = {key: tensor.clone() for key, tensor in load_file(path).items()}
    model = dynamic(build, StateDict(state), device=SimDevice(), prefetch=0, vram_bytes=0, pinned_bytes=pinned_bytes)
    first = model(model.module.input())
    for tensor in state.values():
        tensor.data.zero_()  # not counted as a write, after which it would be read again
    assert same(model(model.module.input()), first) != reads_again


def test_a_downcast_bundle_is_kept_pinned_in_its_smaller_form(path):
    model = dynamic(build, path, torch.bfloat16, device=SimDevice(), prefetch=0, vram_bytes=0, pinned_bytes=ALL)
    assert step(model)["bytes_streamed"] > model.total_bytes
    assert model.pinned_bytes == model.total_bytes
    assert step(model)["bytes_streamed"] == model.total_bytes


def test_an_upcast_bundle_is_kept_pinned_in_its_smaller_form(tmp_path):
    path = tmp_path / "m.safetensors"
    write(path, build(), torch.bfloat16)
    model = dynamic(build, path, torch.float32, device=SimDevice(), prefetch=0, vram_bytes=0, pinned_bytes=ALL)
    for _ in range(2):
        assert step(model)["bytes_streamed"] < model.total_bytes * 0.6
    assert model.pinned_bytes < model.total_bytes * 0.6


def test_pins_stay_within_their_budget(path):
    model = dynamic(build, path, device=SimDevice(), vram_bytes=0)
    half = model.total_bytes // 2
    model.set_policy(model.policy.with_changes(pinned_bytes=half))
    for _ in range(3):
        step(model)
        assert half - model.bundles[0].nbytes < model.pinned_bytes <= half


def test_refused_page_locked_memory_is_replaced_by_pageable_and_said_once(path):
    device = SimDevice(pin_limit=200_000)
    model = dynamic(build, path, device=device, vram_bytes=0, pinned_bytes=ALL)
    expected = plain(build, load_file(path), torch.float32)(model.module.input())
    for _ in range(3):
        assert same(model(model.module.input()), expected)
    assert model.pinned_bytes == model.total_bytes
    assert device.pinned <= 200_000
    (said,) = [text for text in model.ledger.decisions if "pinned memory refused" in text]
    assert "using pageable memory" in said and "smaller pinned RAM budget" in said


@pytest.mark.parametrize("prefetch", [0, 1, 2, 3])
def test_what_comes_next_is_begun_ahead_and_no_more(path, prefetch):
    device = SimDevice()
    model = dynamic(build, path, device=device, prefetch=prefetch, vram_bytes=0, pinned_bytes=0)
    step(model)
    assert step(model)["prefetched"] == (DEPTH if prefetch else 0)
    assert device.most_outstanding == max(1, prefetch)


def test_the_look_ahead_follows_another_order(path):
    model = dynamic(build, path, device=SimDevice(), vram_bytes=0, pinned_bytes=0)
    step(model)
    layers = list(model.module.layers)
    model.module.layers = torch.nn.ModuleList(layers[::2])  # what was begun ahead is not asked for
    step(model)
    step(model)  # in which what was begun in vain ends
    gained = step(model)
    assert gained["prefetched"] == len(layers[::2])
    assert gained["bytes_streamed"] == sum(bundle.nbytes for bundle in model.bundles[::2])


def test_finished_write_backs_do_not_hold_device_memory(path):
    model = dynamic(build, path, device=SimDevice(), vram_bytes=0, pinned_bytes=ALL)
    model.set_patches(patches(model))
    for _ in range(3):
        step(model)
    assert model.caster.write_backs.nbytes == 0


def test_what_is_made_does_not_wait_for_what_was_made_last_to_reach_its_pin(path):
    model, kept = dynamic(build, path, device=SimDevice(), vram_bytes=0, pinned_bytes=ALL), []
    model.set_patches(patches(model))
    for layer in model.module.layers:
        layer.register_forward_hook(lambda *_: kept.append(model.caster.write_backs.nbytes))
    step(model)
    assert max(kept) == 2 * model.bundles[0].nbytes, "its own, and that of the layer before"


def test_no_more_is_on_its_way_to_pins_than_was_planned_for(path):
    device = SimDevice()
    model = dynamic(build, path, device=device, vram_bytes=0, pinned_bytes=ALL)
    model.set_patches(patches(model))
    step(model)
    write_backs, stream = WriteBacks(device, model.pins), device.stream()
    nbytes = model.bundles[0].nbytes
    write_backs.most = 2 * nbytes
    for count, bundle in enumerate(model.bundles, 1):
        assert write_backs.begin(bundle, device.empty(nbytes).zero_(), stream)
        assert write_backs.nbytes == min(count, 2) * nbytes
    device.synchronize()


# The CPU: weights are used where they lie.


def test_a_weight_of_the_right_dtype_is_used_in_the_file_map(path):
    model = dynamic(build, path, vram_bytes=0)
    places = []
    layer = model.module.layers[0]
    layer.register_forward_hook(lambda module, *_: places.append(module.weight.data_ptr()))
    step(model)
    assert places == [layer.weight.data_ptr()]
    assert model.bundles[0].params[0].where[0][0].address < places[0]


def test_a_cast_weight_that_stays_is_cast_once(path):
    model = dynamic(build, path, torch.bfloat16)
    assert step(model)["bytes_loaded"] == model.total_bytes
    gained = step(model)
    assert gained["hits"] == DEPTH and gained["bytes_loaded"] == gained["bytes_streamed"] == 0


@pytest.mark.parametrize(("pinned_bytes", "again"), [(ALL, 0), (0, DEPTH)])
def test_a_patched_weight_without_room_is_patched_once_where_pins_allow(path, pinned_bytes, again):
    model = dynamic(build, path, vram_bytes=0, pinned_bytes=pinned_bytes)
    model.set_patches(patches(model))
    assert step(model)["patched"] == DEPTH
    assert step(model)["patched"] == again
