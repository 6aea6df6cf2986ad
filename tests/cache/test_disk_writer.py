"""Evicted outputs are written by a thread of its own: nobody waits, what waits can be found, and RAM goes first."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from kit.pack import ROOT
from spillway.cache.disk_tier import DiskTier
from spillway.cache.disk_writer import DiskWriter, Job
from spillway.cache.output_cache import OutputCache
from spillway.ops.ledger import Ledger
from spillway.ops.ram.available import Available

MIB = 1 << 20


class SlowTier(DiskTier):
    """A tier whose disk takes nothing until it is told to."""

    def __init__(self, folder, cap=100 * MIB):
        super().__init__(folder, cap, 0.0, Ledger("slow"))
        self.go = threading.Event()
        self.began = threading.Event()

    def store(self, *arguments, stop, **named):
        self.began.set()
        while not self.go.wait(0.01):
            if stop():
                break
        return super().store(*arguments, stop=stop, **named)


@pytest.fixture
def tier(tmp_path):
    tier = SlowTier(tmp_path)
    yield tier
    tier.go.set()


def tensor(mib):
    return torch.zeros(int(mib * MIB), dtype=torch.uint8)


def job(tier, name, mib=1, seconds=10.0):
    return Job(tier, name, [[tensor(mib)]], seconds, "Node", [name], int(mib * MIB))


def test_what_is_queued_is_written_in_order(tier):
    writer = DiskWriter(tier.ledger)
    for name in "abc":
        writer.put(job(tier, name))
    assert writer.nbytes == 3 * MIB and not writer.wait(0.05) and list(tier.folder.iterdir()) == []
    tier.go.set()
    assert writer.wait(20) and writer.nbytes == 0 and writer.written == 3
    assert [tier.load(name)[1:] for name in "abc"] == [(10.0, [name]) for name in "abc"]
    writer.put(job(tier, "d"))
    assert writer.wait(20) and tier.load("d"), "the thread that had ended is followed by another"


def test_what_is_not_written_yet_is_found(tier):
    writer = DiskWriter(tier.ledger)
    jobs = [job(tier, name) for name in "ab"]
    for one in jobs:
        writer.put(one)
    assert tier.began.wait(20)
    for one in jobs:
        outputs, seconds, stamps = writer.take_back(one.name)
        assert outputs is one.outputs and (seconds, stamps) == (10.0, [one.name])
    assert writer.nbytes == 0 and writer.take_back("b") is None and writer.take_back("c") is None
    tier.go.set()
    assert writer.wait(20)
    assert tier.load("a") is not None and tier.load("b") is None, (
        "what was taken back is written when it is evicted again"
    )


def test_the_queue_is_bounded(tmp_path):
    tier = SlowTier(tmp_path, cap=5 * MIB)
    writer = DiskWriter(tier.ledger)
    for name in "abc":
        writer.put(job(tier, name, 2))
    assert writer.nbytes == 4 * MIB and writer.dropped == 1 and "is waiting already" in tier.ledger.decisions[-1]
    writer.put(job(tier, "b", 1))
    assert writer.nbytes == 3 * MIB, "the same again takes its own place"
    tier.go.set()
    assert writer.wait(20) and writer.written == 2


def test_what_is_dropped_was_cheap_for_its_bytes(tier):
    writer = DiskWriter(tier.ledger)
    for name, mib, seconds in (("first", 1, 10.0), ("dear", 2, 1000.0), ("cheap", 2, 1.0), ("middle", 2, 10.0)):
        writer.put(job(tier, name, mib, seconds))
    assert tier.began.wait(20)
    assert writer.drop(3 * MIB) == 4 * MIB and writer.dropped == 2
    assert "2 outputs (4.0 MiB) are lost instead of written: RAM is short" in tier.ledger.decisions[-1]
    assert writer.drop(3 * MIB) == 3 * MIB, "the one being written too"
    assert writer.wait(20) and writer.nbytes == 0 and writer.written == 0
    assert list(tier.folder.iterdir()) == []


def test_the_memory_goes_when_it_is_written(tier):
    import weakref

    writer = DiskWriter(tier.ledger)
    one = job(tier, "a")
    seen = weakref.ref(one.outputs[0][0])
    writer.put(one)
    del one
    assert seen() is not None
    tier.go.set()
    assert writer.wait(20)
    for _ in range(100):
        if seen() is None:
            break
        time.sleep(0.01)
    assert seen() is None


# --- with the cache ---------------------------------------------------------------------------------------------------


def cache_of(tier, total, headroom):
    """A cache on a machine where only the cache and what it queued take RAM."""
    cache = OutputCache(headroom * MIB, entry_bytes=1024, ledger=tier.ledger)
    cache.available = lambda: Available(
        total * MIB - cache.ram_bytes() - cache.writer.nbytes, total * MIB, "the test's memory"
    )
    cache.on_evict = lambda entry, value, nbytes: cache.writer.put(
        Job(tier, str(entry.key), value, entry.seconds, entry.kind, None, nbytes)
    )
    return cache


def test_what_is_being_written_counts_as_freed(tier):
    """Else everything would go while the disk is busy with the first."""
    cache = cache_of(tier, 101, 20)
    for number in range(9):
        cache.put(number, [[tensor(10)]], [[tensor(10)]], seconds=10.0, kind="Node")
    for _ in range(5):
        cache.relieve(cache.headroom)
        assert len(cache.entries) in (7, 8) and cache.writer.nbytes in (10 * MIB, 20 * MIB)
    assert cache.writer.dropped == 0
    tier.go.set()
    assert cache.writer.wait(20) and cache.writer.written


def test_where_ram_is_needed_at_once_it_is_dropped(tier):
    cache = cache_of(tier, 101, 20)
    for number in range(9):
        outputs = [[tensor(10)]]
        cache.put(number, outputs, outputs, seconds=10.0, kind="Node")
    cache.relieve(cache.headroom)
    assert cache.writer.nbytes and not cache.writer.dropped, "half of the headroom is there"
    cache.relieve(cache.headroom + 30 * MIB)
    assert cache.writer.dropped and cache.available().available + cache.writer.nbytes >= 50 * MIB
    assert cache.available().available >= 30 * MIB


def test_memory_that_others_hold_is_not_on_its_way(tier):
    cache = cache_of(tier, 101, 20)
    shared = tensor(50)
    for number in range(3):
        outputs = [[shared, tensor(1)]]
        cache.put(number, outputs, outputs, seconds=10.0, kind="Node")
    cache.put("rest", [[shared]], [[shared]], seconds=1e6, kind="Node")
    cache.protect([[shared]])
    cache.protect([[shared]], keep=False)
    taken = cache.take(2 * MIB)
    assert sum(nbytes for *_, nbytes in taken.gone) <= 4 * MIB
    cache.let_go(taken)


# --- the end of a process ---------------------------------------------------------------------------------------------

ENDS = """
import sys, threading; sys.path.insert(0, 'tests'); import kit.pack, torch
from pathlib import Path
from spillway.cache import disk_tier, disk_writer
from spillway.ops.ledger import Ledger
how, folder = sys.argv[1:]
write = disk_tier.write
def slow(file, *rest):
    if how == 'slow':
        disk_writer.EXIT_SECONDS = 0.3
        while not rest[-1]():
            threading.Event().wait(0.01)
    else:
        threading.Event().wait(0.3)
    write(file, *rest)
disk_tier.write = slow
tier = disk_tier.DiskTier(Path(folder), 1 << 30, 0.0, Ledger('test'))
writer = disk_writer.DiskWriter(tier.ledger)
for name in 'abc':
    writer.put(disk_writer.Job(tier, name, [[torch.ones(1 << 20)]], 10.0, 'Node', None, 4 << 20))
if how == 'raises':
    raise KeyboardInterrupt
"""


@pytest.mark.parametrize(("how", "written"), [("raises", 3), ("slow", 0)])
def test_the_end_of_the_process_finishes_or_gives_up(tmp_path, how, written):
    done = subprocess.run(
        [sys.executable, "-c", ENDS, how, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode == 0) == (how != "raises"), done.stderr
    assert "Fatal" not in done.stderr
    assert len(list(tmp_path.glob("*.output"))) == len(list(tmp_path.iterdir())) == written
    tier = DiskTier(tmp_path, 1 << 30, 0.0, Ledger("later"))
    assert all(tier.load(path.stem) for path in tmp_path.iterdir())
