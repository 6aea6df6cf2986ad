"""Reads of a store that nobody waits for any more: they end, their RAM counts until then, and they hold up nobody."""

import asyncio
import threading
import time

import pytest
import torch

from kit.faulty_store import fresh_faults
from spillway.cache.disk_format import describe
from spillway.cache.store import place, shared_store, workers
from spillway.cache.store.shared_store import Options, SharedStore
from spillway.cache.store.workers import Workers
from spillway.ops.ledger import Ledger

MIB = 1 << 20
NAMES = [f"{number:064x}" for number in range(32)]


faults = pytest.fixture(autouse=True)(fresh_faults)


def member(tmp_path, room=1 << 62, **options):
    return SharedStore(Options(f"far://{tmp_path}", **options), Ledger("shared store"), room=lambda: room)


def put(store, name, nbytes):
    outputs = describe([[torch.full((nbytes,), 7, dtype=torch.uint8)]])
    assert store.store(name, outputs, seconds=20.0, kind="Node", stamps=None, stop=lambda: False)


def load(store, name):
    store.begin_prompt()
    store.reads.succeeded()  # as if the pause were over
    return asyncio.run(store.load(name))


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_read_that_nobody_waits_for_ends_and_is_no_damage(tmp_path, faults, monkeypatch):
    monkeypatch.setattr(place, "RANGE", MIB)
    store = member(tmp_path, wait_seconds=0.5)
    put(store, NAMES[1], 40 * MIB)
    faults.slow = 0.1
    assert load(store, NAMES[1]) is None and store.counts.late == 1
    time.sleep(0.3)  # the range that was under way
    asked = len(faults.calls)
    until(lambda: not store.reserved.nbytes)
    time.sleep(0.5)
    assert len(faults.calls) == asked < 12
    faults.slow = 0.0
    patient = member(tmp_path, wait_seconds=20)
    assert load(patient, NAMES[1])[0][0][0].sum() == 7 * 40 * MIB and not store.counts.refused


def test_a_read_that_hangs_keeps_its_ram_reserved(tmp_path, faults, monkeypatch):
    """The driver has it for as long as it likes. Another read that fits beside it alone is not begun."""
    monkeypatch.setattr(place, "RANGE", MIB)
    store = member(tmp_path, room=15 * MIB, wait_seconds=1.5)
    for name in NAMES[1:4]:
        put(store, name, 10 * MIB)
    put(store, NAMES[4], 4 * MIB)
    real = faults.meet
    monkeypatch.setattr(faults, "meet", lambda what, **more: real(what, **more) or hang_at(what))

    def hang_at(what):
        if what == "cat_file" and faults.calls.count("cat_file") == 5:
            faults.hangs.set()
            while faults.hangs.is_set():
                time.sleep(0.01)

    assert load(store, NAMES[1]) is None and store.reserved.nbytes == 10 * MIB
    monkeypatch.setattr(faults, "meet", lambda *_, **__: None)  # the others are answered
    assert load(store, NAMES[2]) is None, "there is no room for it"
    assert "more than is free beside what is being read" in store.ledger.decisions[-1]
    assert load(store, NAMES[4]) is not None, "a small one fits beside it"
    faults.hangs.clear()
    until(lambda: not store.reserved.nbytes)
    assert load(store, NAMES[2]) is not None and store.counts.refused == 0


def test_reads_at_the_same_time_take_no_more_than_is_free(tmp_path, monkeypatch):
    store = member(tmp_path, room=25 * MIB)
    for name in NAMES[:8]:
        put(store, name, 10 * MIB)
    real, at_once, lock = shared_store.read_outputs, [0, 0], threading.Lock()

    def slowly(file, record):
        with lock:
            at_once[:] = at_once[0] + 1, max(at_once[1], at_once[0] + 1)
        time.sleep(0.2)
        outputs = real(file, record)
        with lock:
            at_once[0] -= 1
        return outputs

    monkeypatch.setattr(shared_store, "read_outputs", slowly)

    async def all_at_once():
        return await asyncio.gather(*(store.load(name) for name in NAMES[:8]))

    found = asyncio.run(all_at_once())
    assert at_once == [0, 2] and 2 <= sum(one is not None for one in found) < 8


def test_a_question_that_is_late_says_nothing_of_the_others(tmp_path, monkeypatch):
    """What was answered in time, if only that it has gone, is not taken for something that takes too long to read."""
    store = member(tmp_path)

    def gone(name):
        store.counts.late += 1  # another question of this prompt gets no answer meanwhile
        raise FileNotFoundError(name)

    monkeypatch.setattr(store.place, "open", gone)
    assert asyncio.run(store.load(NAMES[1])) is None
    monkeypatch.undo()
    put(store, NAMES[1], MIB)
    assert asyncio.run(store.there(NAMES[1]))


def slow_lines(frame, event, _):
    """Have a thread of the workers take its time before each of its lines, so that others meet it in between."""
    if frame.f_code.co_filename != workers.__file__:
        return None
    if event == "line":
        time.sleep(0.002)
    return slow_lines


def test_work_never_waits_for_a_thread_that_has_just_taken_other_work(monkeypatch):
    """A thread that hangs in a drive would hold up what was submitted the moment after."""
    monkeypatch.setattr(workers, "IDLE_SECONDS", 0.2)
    pool = Workers(8, "test")
    threading.settrace(slow_lines)
    try:
        for number in range(20):
            pool.submit(lambda: None).result(5)
            time.sleep(0.02)  # it is idle now
            hangs = threading.Event()
            first = pool.submit(lambda hangs=hangs: hangs.wait(20))
            time.sleep(number % 20 * 0.0005)
            pool.submit(lambda: None).result(5)
            hangs.set()
            assert first.result(5)
        until(lambda: pool._threads == 0)
        assert pool.submit(lambda: 3).result(5) == 3
    finally:
        threading.settrace(None)
