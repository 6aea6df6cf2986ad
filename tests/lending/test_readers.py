"""Readers that are real threads: what they gather is right, errors and interrupts leave nothing taken or written."""

import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from kit.nets import Stack, dynamic, plain, same, write
from kit.threaded_device import Threaded
from spillway.ops.device import readers
from spillway.ops.lending import reading
from spillway.ops.lending.reading import Reading
from spillway.patcher.policy import Rule

DEPTH = 8
ALL = 1 << 40


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "m.safetensors", Stack(DEPTH))
    return tmp_path / "m.safetensors"


def made(path, device=None, **policy):
    return dynamic(lambda: Stack(DEPTH), path, device=device or Threaded(), **{"vram_bytes": 0, **policy})


def expected(path):
    module = plain(lambda: Stack(DEPTH), load_file(path), torch.float32)
    return module(module.input())


def nothing_is_taken(model):
    caster = model.caster
    return caster.arena.taken_bytes == caster.staging.taken_bytes == 0 and not any(b.loan for b in model.bundles)


@pytest.mark.parametrize("pinned", [0, 200_000, ALL])
@pytest.mark.parametrize("share", [0, 0.5, 2])
def test_the_bits_are_those_of_the_plain_module(path, pinned, share):
    model = made(path, pinned_bytes=pinned)
    model.set_policy(model.policy.with_changes(vram_bytes=int(share * model.total_bytes)))
    right = expected(path)
    for _ in range(4):
        assert same(model(model.module.input()), right)
    model.free()
    assert nothing_is_taken(model)


def test_the_launching_thread_gathers_and_locks_nothing(path, monkeypatch):
    here = threading.get_ident()
    who = {"fill": set(), "lock": set()}
    fill, lock = Reading.fill, Threaded.host_empty
    monkeypatch.setattr(Reading, "fill", lambda self: (who["fill"].add(threading.get_ident()), fill(self))[1])
    monkeypatch.setattr(
        Threaded, "host_empty", lambda self, nbytes: (who["lock"].add(threading.get_ident()), lock(self, nbytes))[1]
    )
    for patches in ({}, {f"layers.{index}.weight": torch.neg for index in range(DEPTH)}):
        model = made(path, pinned_bytes=ALL)
        model.set_patches(patches)
        for _ in range(6):
            model(model.module.input())
            time.sleep(0.02)
        assert model.pinned_bytes >= model.total_bytes
    assert who["fill"] and who["lock"]
    assert here not in who["fill"] | who["lock"]


class Broken(Exception):
    pass


@pytest.mark.parametrize("while_sent", [False, True])
@pytest.mark.parametrize("pinned", [0, ALL])
@pytest.mark.parametrize("error", [Broken, MemoryError, KeyboardInterrupt])
def test_an_error_of_a_reader_is_raised_where_its_bundle_is_asked_for(path, monkeypatch, while_sent, pinned, error):
    model = made(path, pinned_bytes=pinned)
    at = model.bundles[4]
    copied, start = reading.copy_into, reading._start

    def copy_into(target, source, **how):
        copied(target, source, **how)
        if source is at.source[0]:
            raise error("in a reader")

    def started(loan, *args):
        event = start(loan, *args)
        if loan.bundle is at:
            raise error("in a reader")
        return event

    seen = []
    for index, layer in enumerate(model.module.layers):
        layer.register_forward_hook(lambda *_, index=index: seen.append(index))
    with monkeypatch.context() as planted:
        planted.setattr(reading, *(("_start", started) if while_sent else ("copy_into", copy_into)))
        with pytest.raises(error, match="in a reader"):
            model(model.module.input())
    assert seen == [0, 1, 2, 3]
    model.free()
    assert nothing_is_taken(model)
    assert while_sent or at not in model.pins._pins
    for _ in range(3):
        assert same(model(model.module.input()), expected(path))


def test_an_interrupt_ends_what_is_yet_to_be_read_before_memory_goes(path, monkeypatch):
    """Readers are slow, and the computation is interrupted while they fill memory."""
    model = made(path, Threaded(1), pinned_bytes=ALL)
    fill, filling = Reading.fill, []

    def slow(self):
        filling.append(self)
        time.sleep(0.03)
        assert self.extent is None or self.extent.segment.taken, "its memory is somebody else's by now"
        fill(self)
        filling.remove(self)

    monkeypatch.setattr(Reading, "fill", slow)
    hook = model.module.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(model.module.input())
    hook.remove()
    model.free()
    assert not filling and nothing_is_taken(model)
    assert same(model(model.module.input()), expected(path))


@pytest.mark.parametrize("step", ["fill", "_send"])
def test_a_pin_that_a_reader_fills_or_sends_is_not_given_to_others(path, monkeypatch, step):
    """RAM runs short, so that another thread frees pins, at the very moment."""
    model = made(path, Threaded(1), pinned_bytes=ALL)
    does, began, may_end = getattr(Reading, step), threading.Event(), threading.Event()
    at = []

    def slow(self, *args):
        if self.pin is not None:
            at.append(self.bundle)
            began.set()
            assert may_end.wait(10)
        does(self, *args)

    monkeypatch.setattr(Reading, step, slow)
    running = threading.Thread(target=lambda: model(model.module.input()))
    running.start()
    assert began.wait(10)
    freeing = threading.Thread(target=lambda: model.pins.drop(at[0]))
    freeing.start()
    freeing.join(0.1)
    kept = freeing.is_alive() and at[0] in model.pins._pins
    may_end.set()
    freeing.join(10)
    running.join(10)
    assert kept and not freeing.is_alive() and not running.is_alive()
    monkeypatch.undo()
    assert same(model(model.module.input()), expected(path))


def test_a_pin_that_memory_was_refused_for_comes_later(path):
    """Page-locked memory is not there yet when it is first asked for, and no refusal is for life."""
    model = made(path, pinned_bytes=ALL)
    room = [0]
    model.prepare()
    model.pins.room = lambda: room[0]
    model(model.module.input())
    assert model.pinned_bytes == 0
    room[0] = ALL
    for _ in range(20):
        model(model.module.input())
        time.sleep(0.02)
    assert model.pins.used == model.total_bytes
    before = model.ledger.counters.bytes_streamed
    model(model.module.input())
    assert model.ledger.counters.bytes_streamed - before == model.total_bytes


def test_work_begins_in_the_order_in_which_it_was_given():
    pool, began, gate = readers.Threads(2), [], threading.Event()

    class Numbered:
        nbytes = 1

        def __init__(self, number):
            self.number = number

        def fill(self):
            began.append(self.number)
            gate.wait(10)

        def undo(self): ...

    jobs = [pool.submit(Numbered(number)) for number in range(6)]
    time.sleep(0.1)
    assert sorted(began) == [0, 1]
    jobs[5].cancel()
    gate.set()
    for job in jobs[:5]:
        job.wait()
    assert sorted(began) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rule", [None, "ram"])
@pytest.mark.parametrize("share", [0, 0.5, 2])
def test_memory_that_was_asked_for_in_inference_mode_is_filled_outside_of_it(path, rule, share):
    """ComfyUI samples in inference mode, whose tensors no other thread could write into."""
    rules = () if rule is None else (Rule("layers.*", offload=rule),)
    model = made(path, pinned_bytes=ALL, rules=rules)
    model.set_policy(model.policy.with_changes(vram_bytes=int(share * model.total_bytes)))
    right, negative = expected(path), {f"layers.{index}.weight": lambda w: w.neg_().neg_() for index in range(DEPTH)}
    with torch.inference_mode():
        for patches in ({}, negative, {}):
            model.set_patches(patches)
            for _ in range(3):
                assert same(model(model.module.input()), right)
                time.sleep(0.01)
    assert not model.ledger.counters.retries and not any("failed" in text for text in model.ledger.decisions)
