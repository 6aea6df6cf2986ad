"""A cap on the output cache's own RAM, beside the headroom, and the figures of each run."""

import logging

import torch

from spillway.cache.output_cache import OutputCache
from spillway.ops.ram.available import Available

MIB = 1 << 20


def cache(cap=None, free=10_000):
    """A cache on a machine with plenty of RAM."""
    made = OutputCache(10 * MIB, available=lambda: Available(free * MIB, free * MIB, "the test's"), entry_bytes=1024)
    made.cap = None if cap is None else cap * MIB
    return made


def put(cache, key, mib=10, seconds=1.0, **options):
    outputs = [torch.zeros(mib * MIB, dtype=torch.uint8)]
    return cache.put(key, outputs, outputs, seconds=seconds, **options)


def test_no_more_than_the_cap_is_held_however_much_is_free():
    engine = cache(cap=35)
    for number in range(6):
        put(engine, number, seconds=number)
        engine.relieve(engine.headroom)
        assert engine.ram_bytes() <= 35 * MIB
    assert set(engine.values) == {3, 4, 5}  # the cheapest to make again have gone
    assert "the cap of 35.0 MiB on cached outputs" in engine.ledger.decisions[-1]
    free = cache()
    for number in range(6):
        put(free, number)
        assert not free.relieve(free.headroom)
    assert len(free.values) == 6


def test_the_headroom_counts_beside_the_cap():
    engine = cache(cap=1000, free=5)  # less than the headroom is available, whatever goes
    for number in range(3):
        put(engine, number)
    assert engine.relieve(engine.headroom) > 0 and "the test's" in engine.ledger.decisions[-1]


def test_what_the_run_will_still_read_stays_beyond_the_cap():
    """Else it would have to be made again at once, and again."""
    engine = cache(cap=15)
    for number in range(4):
        put(engine, number)
    engine.relieve(engine.headroom, lambda: {1, 2})
    assert set(engine.values) == {1, 2}
    engine.relieve(engine.headroom, lambda: {2})
    assert set(engine.values) == {2}


def test_the_figures_of_a_run(caplog):
    engine = cache(cap=25)
    engine.begin_prompt([])
    for number in range(2):
        put(engine, number, seconds=2.0 + number)
    assert engine.run.as_dict() == {
        "hits": 0,
        "hit_bytes": 0,
        "saved_seconds": 0.0,
        "misses": 2,
        "made_bytes": 20 * MIB,
        "made_seconds": 5.0,
        "evictions": 0,
        "evicted_bytes": 0,
    }
    with caplog.at_level(logging.DEBUG, logger="spillway"):
        engine.begin_prompt([0, 1, 2])
    assert "the last run found 0 outputs" in caplog.text and "made 2 (20.0 MiB, 5.0 s)" in caplog.text
    assert (engine.run.hits, engine.run.hit_bytes, engine.run.saved_seconds) == (2, 20 * MIB, 5.0)
    put(engine, 2, seconds=1.0)
    put(engine, 3, seconds=9.0, found=True)  # on disk
    engine.touch(0)  # once a run
    engine.relieve(engine.headroom)
    run = engine.run
    assert (run.hits, run.saved_seconds, run.misses, run.made_seconds) == (3, 14.0, 1, 1.0)
    assert run.evictions == 2 and 20 * MIB <= run.evicted_bytes < 21 * MIB
    engine.begin_prompt([])
    engine.begin_prompt([])  # a run of nothing is not kept
    figures = engine.as_dict()
    assert len(figures["runs"]) == 2 and figures["runs"][1]["evictions"] == 2 and figures["cap_bytes"] == 25 * MIB
    assert figures["run"]["hits"] == 0
