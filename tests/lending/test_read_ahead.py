"""What readers bring ahead: further than the device has room for, once each, and no longer once a guess has failed."""

import gc
import time
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from kit.nets import dynamic, plain, same, write
from kit.shuffled import DEPTH, WIDTH, Shuffled
from kit.sim_device import SimDevice
from kit.threaded_device import Threaded
from spillway.ops.gather import aligned
from spillway.ops.lending.reading import Reading
from spillway.patcher import residency


def double(weight):
    return weight * 2


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "m.safetensors", Shuffled(0))
    return tmp_path / "m.safetensors"


@pytest.fixture
def read(monkeypatch):
    """How often each bundle was read."""
    counts, fill = Counter(), Reading.fill
    monkeypatch.setattr(Reading, "fill", lambda self: (counts.update([self.bundle]), fill(self))[1])
    return counts


def run_and_compare(model, path, seed):
    reference = plain(lambda: Shuffled(seed), load_file(path), torch.float32)
    assert same(model(model.module.input()), reference(reference.input()))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_step_in_an_order_that_nobody_knew_reads_little_twice(path, read, seed, share):
    model = dynamic(lambda: Shuffled(seed), path, device=SimDevice(eager=True), pinned_bytes=0)
    model.set_policy(model.policy.with_changes(vram_bytes=int(share * model.total_bytes)))
    run_and_compare(model, path, seed)
    assert len(read) == DEPTH
    assert read.total() <= 8 * DEPTH // 3


def test_nothing_is_read_twice_once_the_order_is_known(path, read):
    model = dynamic(lambda: Shuffled(1), path, device=SimDevice(eager=True), vram_bytes=0, pinned_bytes=0)
    for _ in range(2):
        run_and_compare(model, path, 1)
    ahead = Counter(list(model.caster.read_ahead._readings))  # for the third step
    read.clear()
    run_and_compare(model, path, 1)
    assert max((read + ahead).values()) <= 2  # for this step, and for the one that follows
    assert DEPTH <= read.total() + ahead.total() <= DEPTH + 8


def test_host_memory_is_filled_further_ahead_than_the_device_has_room_for(path):
    model = dynamic(lambda: Shuffled(2), path, device=SimDevice(eager=True), vram_bytes=0, pinned_bytes=0)
    seen = []

    def look(*_):
        caster = model.caster
        seen.append((len(caster.prefetched), len(caster.read_ahead._readings)))

    run_and_compare(model, path, 2)
    for layer in model.module.layers:
        layer.register_forward_hook(look)
    run_and_compare(model, path, 2)
    sent, read = (max(column) for column in zip(*seen, strict=True))
    assert read >= 1
    assert model.caster.staging.taken_bytes <= model.caster.staging.capacity
    assert sent + read >= 4


def test_what_is_on_its_way_to_where_it_stays_holds_no_buffer_and_gives_none_way(path, read):
    model = dynamic(lambda: Shuffled(3), path, device=SimDevice(eager=True), pinned_bytes=0)
    model.module.order = list(range(DEPTH))
    coming = []

    def need_all(*_):
        caster = model.caster
        before = [bundle for bundle, loan in caster.prefetched.items() if loan.goes_to_its_slice]
        caster.make_way(caster.room + 1)
        assert list(caster.prefetched) == before
        coming.append(len(before))

    hook = model.module.layers[8].register_forward_hook(need_all)
    model(model.module.input())
    hook.remove()
    assert coming[0] > 4
    assert read.total() == len(read) == DEPTH


def test_a_large_bundle_that_stays_does_not_size_the_memory_for_transfers(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
            self.large = torch.nn.Linear(WIDTH, 40 * WIDTH)

        def input(self):
            return torch.linspace(-1, 1, WIDTH).repeat(3, 1)

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.large(x)

    write(tmp_path / "m.safetensors", Net())
    model = dynamic(Net, tmp_path / "m.safetensors", device=SimDevice(eager=True), pinned_bytes=0)
    model.set_patches({f"layers.{index}.weight": double for index in range(DEPTH)})
    model.set_policy(model.policy.with_changes(vram_bytes=model.total_bytes * 9 // 10))
    model(model.module.input())
    residency = model.residency
    offloaded = [bundle for bundle in model.bundles if bundle not in residency.addresses[: residency.plan.resident]]
    assert offloaded and all(bundle.nbytes < model.total_bytes // 4 for bundle in offloaded)
    casts = max(bundle.offload_cost() - bundle.source_bytes for bundle in offloaded)
    assert model.caster.arena.capacity + casts <= model.caster.room


@pytest.mark.parametrize("share", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("large", [1, 4, 8, 40])
def test_the_arena_leaves_what_a_patch_takes_of_what_stays(tmp_path, large, share):
    """Its source arrives in its slice, not in the arena. Else all that is on its way would be ended, and read again."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
            self.large = torch.nn.Linear(WIDTH, large * WIDTH)

        def input(self):
            return torch.linspace(-1, 1, WIDTH).repeat(3, 1)

        def forward(self, x):
            x = self.large(x)[:, :WIDTH]
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    write(tmp_path / "m.safetensors", Net())
    model = dynamic(Net, tmp_path / "m.safetensors", device=SimDevice(eager=True), pinned_bytes=0)
    model.set_patches(dict.fromkeys((key for key in model.by_key if key.endswith("weight")), double))
    most = max(bundle.offload_cost() for bundle in model.bundles)
    model.set_policy(model.policy.with_changes(vram_bytes=int(share * model.total_bytes) + most))
    residency, beside = model.prepare(), []
    caster = residency.caster
    complete = caster.complete

    def watched(loan):
        left = caster.room - caster.arena.capacity - loan.cast_bytes()
        offloaded = [b for b in model.bundles if b not in residency.addresses[: residency.plan.resident]]
        beside.append(left >= 0 or caster.arena.capacity <= max(aligned(b.source_bytes) for b in offloaded))
        return complete(loan)

    caster.complete = watched
    model(model.module.input())
    assert len(beside) == len(model.bundles) and all(beside)


def test_memory_that_was_freed_is_held_by_nobody(path):
    """Nor by a cycle that only the collector would find, which may not run before the next model needs the memory."""
    device = Threaded()
    model = dynamic(lambda: Shuffled(3), path, device=device, pinned_bytes=0)
    gc.collect()
    gc.disable()
    try:
        for share in (1.0, 0.5):
            model.set_policy(model.policy.with_changes(vram_bytes=int(share * model.total_bytes)))
            for _ in range(2):
                model(model.module.input())
            model.free()
            device.synchronize()
            end = time.monotonic() + 5
            while device.held() and time.monotonic() < end:  # a reader is just leaving what it has ended
                time.sleep(0.01)
            assert device.held() == 0
    finally:
        gc.enable()


def test_what_is_asked_for_waits_for_the_memory_of_what_is_being_read(path, monkeypatch):
    """Where all of it is on its way to be sent. Memory beside it would be counted by nobody."""
    monkeypatch.setattr(residency, "room_for_staging", lambda sizes, *_: max(sizes))
    fill, beside = Reading.fill, []

    def slow(self):
        time.sleep(0.002)
        if self.extent is None and self.pin is None:
            beside.append(self.bundle)
        fill(self)

    monkeypatch.setattr(Reading, "fill", slow)
    model = dynamic(lambda: Shuffled(0), path, device=Threaded(1), pinned_bytes=0)
    run_and_compare(model, path, 0)  # in another order than was guessed, so that others are on their way
    assert not beside


@pytest.mark.parametrize("bundles", [1, 2, 3])
@pytest.mark.parametrize("gives_up", [False, True])
def test_staging_memory_is_filled_again_once_nothing_is_sent_from_it(path, monkeypatch, bundles, gives_up):
    """gives_up: now and then, what is to be read is not. Its memory may still be sent from then."""
    monkeypatch.setattr(residency, "room_for_staging", lambda sizes, *_: bundles * max(sizes))
    model = dynamic(lambda: Shuffled(0), path, device=SimDevice(), vram_bytes=0, pinned_bytes=0)
    if gives_up:
        for layer in model.module.layers[::3]:
            layer.register_forward_hook(lambda *_: model.caster.read_ahead.end())
    for _ in range(4):
        run_and_compare(model, path, 0)
