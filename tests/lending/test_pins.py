"""Pins lie in a few large blocks, which go back to the system as a whole, the least recently used first."""

import ctypes
import gc
import mmap
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from kit.nets import DEPTH, Stack, dynamic, plain, same
from kit.sim_device import SimDevice
from spillway.ops.device import locked_memory as host_memory
from spillway.ops.device.locked_memory import locked
from spillway.ops.files.source import StateDict
from spillway.ops.lending import pins as pins_module
from spillway.ops.lending.pin_blocks import Block
from spillway.ops.lending.pins import Pins
from spillway.ops.lending.write_backs import WriteBacks
from spillway.ops.ram import available

ALL = 1 << 40


class Counting(SimDevice):
    """Remembers the sizes of host memory that was locked; refuses after `refuse_after` requests."""

    def __init__(self, refuse_after=1 << 30):
        super().__init__()
        self.asked, self.refuse_after = [], refuse_after

    def host_empty(self, nbytes):
        if nbytes:
            self.asked.append(nbytes)
            if len(self.asked) > self.refuse_after:
                raise RuntimeError("simulated: no more locked memory")
        return super().host_empty(nbytes)


def right(model, path):
    reference = plain(lambda: Stack(DEPTH), load_file(path), torch.float32)
    return same(model(reference.input()), reference(reference.input()))


def made(path, device, **policy):
    return dynamic(lambda: Stack(DEPTH), path, device=device, vram_bytes=0, **policy)


def staging(model):
    return [block.buffer.numel() for block in model.caster.staging._blocks]


def test_a_model_is_pinned_in_one_block_where_it_fits(path):
    device = Counting()
    model = made(path, device, pinned_bytes=ALL)
    assert right(model, path) and right(model, path)
    assert device.asked == [model.total_bytes]
    assert model.pinned_bytes == model.total_bytes


@pytest.mark.parametrize("per_block", [1, 3, 5])
def test_blocks_end_where_a_bundle_ends(path, monkeypatch, per_block):
    device = Counting()
    model = made(path, device, pinned_bytes=ALL)
    size = model.bundles[0].nbytes
    monkeypatch.setattr(pins_module, "BLOCK_BYTES", int(size * (per_block + 0.9)))
    assert right(model, path)
    assert device.asked == [per_block * size] * (DEPTH // per_block) + [DEPTH % per_block * size] * (
        DEPTH % per_block > 0
    )
    assert model.pinned_bytes == model.total_bytes  # nothing is wasted at the ends


def test_the_next_block_comes_before_it_is_asked_for(path, monkeypatch):
    device = Counting()
    model = made(path, device, pinned_bytes=ALL)
    bundles, size = model.bundles, model.bundles[0].nbytes
    monkeypatch.setattr(pins_module, "BLOCK_BYTES", 2 * size)
    pins = Pins(device, ALL)
    pins.expect(bundles[1:])
    assert pins.take(bundles[1], size, None) is not None
    assert device.asked == [2 * size], "there is room for one more"
    assert pins.take(bundles[2], size, None) is not None
    assert device.asked == [2 * size] * 2
    for bundle in bundles[3:]:
        assert pins.take(bundle, size, None) is not None
    assert sum(device.asked) == (len(bundles) - 1) * size, "none for those that stay on the device"


def test_pins_of_what_stays_on_the_device_give_way(path):
    device = SimDevice()
    model = made(path, device, pinned_bytes=ALL)
    bundles, size = model.bundles, model.bundles[0].nbytes
    pins = Pins(device, 2 * size)
    pins.expect(bundles[:2])
    first, second = (pins.take(bundle, size, None) for bundle in bundles[:2])
    assert first is not None and second is not None
    for pin in (first, second):
        pins.release(pin)
    assert pins.take(bundles[2], size, None) is None, "nothing is known of it"
    pins.expect(bundles[1:3])  # the first has come to stay
    assert pins.take(bundles[2], size, None) is not None
    assert pins.get(bundles[0]) is None and pins.get(bundles[1]) is second
    assert pins.take(bundles[3], size, None) is None, "to evict what is asked for as often would only move the miss"


class LaterDevice(SimDevice):
    """Locks memory in a thread of its own, which takes until `now`."""

    def __init__(self):
        super().__init__()
        self.now = False

    def readers(self):
        return self

    def aside(self, call):
        return self

    def ready(self):
        return self.now


class SeveralDevice(SimDevice):
    """Locks memory in threads, each of which takes until its `now`."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def readers(self):
        return self

    def aside(self, call):
        later = SimpleNamespace(now=False, result=call)
        later.ready = lambda: later.now
        self.asked.append(later)
        return later


def test_several_blocks_are_on_their_way_at_once(path, monkeypatch):
    """A driver locks one while threads touch the next, or readers would have to wait for a pin."""
    model = made(path, SimDevice(), pinned_bytes=ALL)
    bundles, size = model.bundles, model.bundles[0].nbytes
    monkeypatch.setattr(pins_module, "BLOCK_BYTES", 2 * size)
    device = SeveralDevice()
    pins = Pins(device, ALL)
    pins.expect(bundles)
    assert pins.take(bundles[0], size, None) is None
    assert len(device.asked) == pins_module.COMING and pins.held == 2 * size * pins_module.COMING
    assert pins.take(bundles[1], size, None) is None and len(device.asked) == pins_module.COMING
    device.asked[0].now = True
    pin = pins.take(bundles[2], size, None)
    assert pin is not None, "of what came"
    pins.release(pin)
    assert len(device.asked) == pins_module.COMING + 1
    assert pins.free(1 << 60) and not pins.held, "what is on its way is waited for"


@pytest.mark.parametrize("outgrow", [True, False])
def test_pins_wait_for_what_is_read_to_leave_the_page_cache(path, monkeypatch, outgrow):
    """Memory that is locked would else take the place of what is read next."""
    model = made(path, SimDevice(), pinned_bytes=ALL)
    device, bundle = SeveralDevice(), model.bundles[0]
    pins = Pins(device, ALL)
    pins.outgrow_ram = outgrow
    monkeypatch.setattr(available, "unused_ram", lambda: 0)
    assert pins.displace_pages() == outgrow
    assert pins.take(bundle, bundle.nbytes, None) is None
    assert bool(device.asked) != outgrow
    assert pins.take(bundle, bundle.nbytes, None) is None
    assert device.asked, "the next step's request is not refused, or a system that keeps its cache full had no pins"
    monkeypatch.setattr(available, "unused_ram", lambda: 1 << 40)
    assert not pins.displace_pages(), "nothing has to go"
    pins = Pins(device, ALL)
    pins.outgrow_ram, before = outgrow, len(device.asked)
    pins.take(bundle, bundle.nbytes, None)
    assert len(device.asked) > before


@pytest.mark.parametrize("room", [0.3, 0.5, 0.8])
def test_what_has_no_room_in_pins_is_spread_over_the_step(path, room):
    model = made(path, SimDevice(), pinned_bytes=ALL)
    bundles, size = model.bundles, model.bundles[0].nbytes
    pins = Pins(SimDevice(), int(room * len(bundles) * size))
    pins.expect(bundles)
    has = [pins.take(bundle, size, None) is not None for bundle in bundles]
    assert sum(has) == int(room * len(bundles)), "no room is left unused"
    for end in range(1, len(bundles) + 1):
        assert abs(sum(has[:end]) - room * end) <= 1
    pins.expect(bundles)
    assert [pins.holds(bundle) for bundle in bundles] == has, "the choice stays"


def test_what_was_left_out_has_what_others_cannot_use(path, monkeypatch):
    model = made(path, SimDevice(), pinned_bytes=ALL)
    bundles, size = model.bundles, model.bundles[0].nbytes
    monkeypatch.setattr(bundles[1], "nbytes", 3 * size)
    pins = Pins(SimDevice(), 2 * size)
    pins.expect(bundles[:3])
    assert [bundle for bundle in bundles[:3] if bundle in pins._last] == [bundles[0]]
    assert pins.take(bundles[0], size, None) is None, "it waits"
    pins.outgrow_ram = True
    monkeypatch.setattr(available, "unused_ram", lambda: 0)
    assert pins.take(bundles[2], size, None) is None and pins._waits(bundles[0]), "memory is yet to come"
    pins.outgrow_ram = False
    assert pins.take(bundles[1], 3 * size, None) is None, "there is no room for it"
    assert pins.take(bundles[0], size, None) is not None


def test_no_block_is_larger_than_what_is_left_of_the_budget(path):
    device = Counting()
    model = made(path, device)
    size = model.bundles[0].nbytes
    model.set_policy(model.policy.with_changes(pinned_bytes=int(3.5 * size)))
    assert right(model, path) and right(model, path)
    assert model.pinned_bytes <= 3.5 * size
    assert model.caster.pins.used == 3 * size
    assert sum(device.asked) - sum(staging(model)) <= 3.5 * size


def test_the_block_that_was_used_longest_ago_goes_first_and_as_a_whole(path, monkeypatch):
    model = made(path, Counting(), pinned_bytes=ALL, prefetch=0)
    size = model.bundles[0].nbytes
    monkeypatch.setattr(pins_module, "BLOCK_BYTES", 2 * size)
    assert right(model, path)
    pins = model.caster.pins
    for bundle in model.bundles[:2]:  # the first block is the one that was used last
        pins.get(bundle)
    assert model.free_pins(1) == 2 * size
    gone = [bundle for bundle in model.bundles if bundle not in pins._pins]
    assert gone == model.bundles[2:4]
    assert model.pinned_bytes == pins.used == model.total_bytes - 2 * size
    assert right(model, path)
    assert model.pinned_bytes == model.total_bytes  # it comes back


def test_freeing_everything_gives_everything_back(path, monkeypatch):
    model = made(path, Counting(), pinned_bytes=ALL)
    monkeypatch.setattr(pins_module, "BLOCK_BYTES", 3 * model.bundles[0].nbytes)
    assert right(model, path)
    assert model.free_pins(0) == 0
    assert model.free_pins() == model.total_bytes
    assert model.pinned_bytes == model.caster.pins.used == 0
    assert right(model, path)


def test_a_lower_budget_takes_blocks_back(path, monkeypatch):
    model = made(path, Counting(), pinned_bytes=ALL)
    size = model.bundles[0].nbytes
    monkeypatch.setattr(pins_module, "BLOCK_BYTES", 2 * size)
    assert right(model, path)
    model.set_policy(model.policy.with_changes(pinned_bytes=5 * size))
    assert model.pinned_bytes == 4 * size
    assert right(model, path) and model.pinned_bytes <= 5 * size


def test_a_refused_block_is_pageable_and_as_right(path, monkeypatch):
    device = Counting(refuse_after=2)
    model = made(path, device, pinned_bytes=ALL)
    monkeypatch.setattr(pins_module, "BLOCK_BYTES", 2 * model.bundles[0].nbytes)
    assert right(model, path) and right(model, path)
    assert model.pinned_bytes == model.total_bytes
    assert any("using pageable memory" in text for text in model.ledger.decisions)


def test_a_changed_patch_takes_the_place_of_the_old_form(path):
    device = Counting()
    model = made(path, device, pinned_bytes=ALL)
    keys = [f"layers.{index}.weight" for index in range(DEPTH)]
    for _ in range(4):
        model.set_patches({key: torch.neg for key in keys})
        model(model.module.input())
        model.set_patches({})
        assert right(model, path)
    assert model.pinned_bytes == model.total_bytes
    pins = list(device.asked)
    for nbytes in staging(model):
        pins.remove(nbytes)
    assert pins == [model.total_bytes]


def test_memory_that_is_written_back_goes_afterwards(path):
    device = SimDevice()
    model = made(path, device, pinned_bytes=ALL, prefetch=0)
    model.set_patches({f"layers.{index}.weight": torch.neg for index in range(DEPTH)})
    model(model.module.input())
    assert model.caster.write_backs.nbytes
    assert model.free_buffers() > 0
    device.synchronize()  # a copy whose memory has gone would raise
    assert model.caster.write_backs.nbytes == 0 and device.held() == 0


def test_a_pin_that_goes_is_filled_by_then(path):
    device = SimDevice()
    model = made(path, device, pinned_bytes=ALL, prefetch=0)
    model.set_patches({f"layers.{index}.weight": torch.neg for index in range(DEPTH)})
    model(model.module.input())
    pins = model.caster.pins
    assert any(stream.done < stream.given for stream in device.all_streams)
    for bundle in model.bundles:
        pin = pins.get(bundle)
        pins.drop(bundle)
        pin.buffer.zero_()  # as whoever has this memory next may do
    device.synchronize()
    assert not any(block.buffer.any() for block in pins._blocks.blocks)


class Interrupted(SimDevice):
    """Is interrupted right after it has begun to copy, the `at`-th time, into a pin or out of the host."""

    at = 0
    into_pins = True

    def copy(self, target, source, stream):
        super().copy(target, source, stream)
        if stream is not None and self.into_pins != bool(self._in_use_until(target)):
            self.at -= 1
            if self.at == 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize("into_pins", [True, False], ids=["a write-back", "a transfer"])
@pytest.mark.parametrize("at", range(1, DEPTH + 1))
def test_a_copy_that_is_interrupted_writes_nothing_later(path, at, into_pins):
    device = Interrupted()
    device.into_pins = into_pins
    model = made(path, device, pinned_bytes=ALL)
    keys = [f"layers.{index}.weight" for index in range(DEPTH)]
    model.set_patches({key: torch.neg for key in keys})
    device.at = at
    with pytest.raises(KeyboardInterrupt):
        model(model.module.input())
    assert model.bundles[at - 1].pinned_version is None
    # The sources are pinned now, where the copy that was begun was to go.
    model.set_patches({})
    assert right(model, path) and right(model, path)


@pytest.mark.parametrize("prefetch", [0, None], ids=["when asked for", "ahead"])
@pytest.mark.parametrize("at", range(1, DEPTH + 1))
def test_a_transfer_that_is_interrupted_ends_before_its_memory_goes(path, at, prefetch):
    device = Interrupted()
    device.into_pins = False
    model = made(path, device, pinned_bytes=ALL, prefetch=prefetch)
    for _ in range(3):
        assert right(model, path)  # every bundle comes from its pin now
    device.at = at
    with pytest.raises(KeyboardInterrupt):
        model(model.module.input())
    model.free()
    device.synchronize()  # a copy whose memory has gone would raise
    assert device.held() == 0
    assert right(model, path) and right(model, path)


def test_a_pin_is_filled_again_once_its_last_transfer_is_known_to_be_done(path):
    state = {key: tensor.clone() for key, tensor in load_file(path).items()}
    asked = {"vram_bytes": 0, "pinned_bytes": ALL, "prefetch": 0}
    model = dynamic(lambda: Stack(DEPTH), StateDict(state), device=SimDevice(), **asked)
    for _ in range(3):
        model(model.module.input())
        for tensor in state.values():
            tensor.mul_(0.5)  # counted, so the pins are of no use any more
    reference = plain(lambda: Stack(DEPTH), state, torch.float32)
    assert same(model(model.module.input()), reference(reference.input()))


def test_a_blocks_gaps_are_joined_and_used_again():
    block = Block(torch.empty(4096, dtype=torch.uint8))
    a, b, c = (block.cut(1024) for _ in range(3))
    assert [part.start for part in (a, b, c)] == [0, 1024, 2048]
    assert block.cut(2048) is None
    block.join(a)
    block.join(c)
    assert block.gaps == [(0, 1024), (2048, 2048)]
    assert block.cut(2048).start == 2048
    block.join(b)
    assert block.gaps == [(0, 2048)]
    assert block.cut(2048).view.data_ptr() == block.buffer.data_ptr()


def test_locked_memory_is_unlocked_when_its_last_view_is_gone():
    calls = []
    memory = locked(5000, lambda *given: calls.append(("lock", *given)), lambda at: calls.append(at) or True)
    address = memory.data_ptr()
    assert calls == [("lock", address, 5000)] and address % 4096 == 0
    view = memory[100:200].fill_(7)
    del memory
    gc.collect()
    assert len(calls) == 1 and bool((view == 7).all())
    del view
    gc.collect()
    assert calls[1:] == [address]


@pytest.mark.skipif(sys.platform != "linux", reason="asks mincore")
def test_memory_is_there_before_the_driver_locks_it():
    """A driver makes pages one after the other, in its own lock, in which no kernel is launched."""
    libc, nbytes = ctypes.CDLL(None, use_errno=True), 3 * host_memory.PART_BYTES // 2
    there = (ctypes.c_ubyte * (nbytes // mmap.PAGESIZE))()

    def lock(address, count):
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(count), there) == 0

    untouched = host_memory.anonymous(nbytes)
    lock(torch.frombuffer(memoryview(untouched), dtype=torch.uint8).data_ptr(), nbytes)
    assert not any(byte & 1 for byte in there), "this asks nothing"
    memory = locked(nbytes, lock, lambda address: True)
    assert all(byte & 1 for byte in there) and not memory.any()


def test_memory_that_the_driver_does_not_unlock_is_kept(monkeypatch):
    monkeypatch.setattr(host_memory, "_stuck", [])
    memory = locked(5000, lambda address, nbytes: None, lambda address: False)
    memory.fill_(9)
    del memory
    gc.collect()
    (pages,) = host_memory._stuck
    assert pages[:5000] == bytes([9]) * 5000


def test_locked_memory_that_is_refused_is_not_unlocked():
    calls = []

    def refuse(address, nbytes):
        raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        locked(5000, refuse, calls.append)
    gc.collect()
    assert not calls


def test_a_write_back_that_fails_half_way_has_ended_before_its_pin_goes(path, monkeypatch):
    """What a copy still writes into would be another bundle's pin."""
    device, under_way = SimDevice(), []
    model = made(path, device, pinned_bytes=ALL)
    bundle, pins, stream = model.bundles[0], Pins(device, ALL), device.stream()
    record, drop = SimDevice.record, Pins.drop

    def refuse(backend, on):
        if on is stream:  # after the copy
            raise RuntimeError("simulated: no event")
        return record(backend, on)

    def look(pins, other):
        under_way.append(stream.done < stream.given)
        return drop(pins, other)

    memory, write_backs = device.empty(bundle.nbytes).zero_(), WriteBacks(device, pins)
    assert write_backs.begin(bundle, memory, stream)
    device.synchronize()
    monkeypatch.setattr(SimDevice, "record", refuse)
    monkeypatch.setattr(Pins, "drop", look)
    with pytest.raises(RuntimeError, match="no event"):
        write_backs.begin(bundle, memory, stream)
    assert under_way[-1] is False and not pins.holds(bundle)
