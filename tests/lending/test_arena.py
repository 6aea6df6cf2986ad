"""Arenas: every byte has one owner, what was free for longest is used first, and nobody is given memory in use."""

import random
import threading

import pytest
import torch

from spillway.ops.device.backend import Event
from spillway.ops.lending.arena import Arena

UNIT = 512


def memory(nbytes):
    return torch.zeros(nbytes, dtype=torch.uint8)


class Use(Event):
    """A use that ends when somebody waits for it, or by itself when `ended` is set."""

    def __init__(self, name=None, log=None):
        self.name, self.log, self.ended = name, log, False

    def synchronize(self):
        self.ended = True
        if self.log is not None:
            self.log.append(self.name)

    def query(self):
        return self.ended


def arena_of(units, block_bytes=None, **options):
    arena = Arena(memory, **options)
    arena.resize(units * UNIT, block_bytes)
    return arena


def test_nothing_is_allocated_before_it_is_asked_for():
    arena = arena_of(8)
    assert arena.nbytes == 0
    assert arena.take(1).view.numel() == 1
    assert arena.nbytes == 8 * UNIT


def test_what_has_been_free_for_longest_is_used_first():
    arena = arena_of(4)
    extents = [arena.take(UNIT) for _ in range(4)]
    uses = [Use() for _ in extents]
    for place in (2, 0, 3, 1):
        arena.give(extents[place], uses[place])
    for place in (2, 0, 3, 1):
        again = arena.take(UNIT)
        assert again.view.data_ptr() == extents[place].view.data_ptr()
        assert again.after == [uses[place]]


def test_a_range_over_several_waits_for_all_of_them_and_for_no_others():
    arena = arena_of(5)
    extents = [arena.take(UNIT) for _ in range(5)]
    uses = [Use() for _ in extents]
    for extent, use in zip(extents, uses, strict=True):
        arena.give(extent, use)
    assert arena.take(2 * UNIT + 1).after == uses[:3]
    assert arena.take(UNIT).after == uses[3:4]


def test_the_rest_of_a_range_that_is_cut_is_waited_for_too():
    arena = arena_of(4)
    use = Use()
    arena.give(arena.take(4 * UNIT), use)
    assert [arena.take(UNIT).after for _ in range(4)] == [[use]] * 4
    assert arena.take(1) is None


def test_a_use_that_has_ended_is_not_waited_for():
    arena = arena_of(1)
    use = Use()
    arena.give(arena.take(UNIT), use)
    use.ended = True
    assert arena.take(UNIT).after == []


def test_new_memory_waits_for_its_birth():
    born = Use()
    arena = arena_of(2, born=lambda: born)
    assert arena.take(UNIT).after == arena.take(UNIT).after == [born]


def test_what_is_larger_than_the_arena_is_refused():
    arena = arena_of(4)
    assert arena.take(5 * UNIT) is None
    assert arena.nbytes == 0


def test_a_smaller_arena_frees_what_nothing_uses_once_it_is_done():
    log = []
    arena = arena_of(8, block_bytes=2 * UNIT)
    extents = [arena.take(2 * UNIT) for _ in range(4)]
    for number, extent in enumerate(extents[:3]):
        arena.give(extent, Use(number, log))
    arena.resize(2 * UNIT, 2 * UNIT)
    assert arena.nbytes == 2 * UNIT == extents[3].view.numel()
    assert sorted(log) == [0, 1, 2]
    assert arena.take(1) is None
    arena.give(extents[3], None)
    arena.clear()
    assert arena.nbytes == 0


@pytest.mark.parametrize("block_bytes", [None, 3 * UNIT])
def test_no_two_owners_share_a_byte_and_no_byte_is_lost(block_bytes):
    rng = random.Random(1)
    arena = arena_of(16, block_bytes=block_bytes)
    held = []
    for number in range(3000):
        if held and rng.random() < 0.5:
            extent, mark = held.pop(rng.randrange(len(held)))
            assert bool((extent.view == mark).all()), "another owner has written here"
            arena.give(extent, rng.choice([None, Use()]))
        else:
            extent = arena.take(rng.randint(1, 5 * UNIT))
            if extent is not None:
                extent.view.fill_(number % 251)
                held.append((extent, number % 251))
        assert arena.taken_bytes <= arena.nbytes <= 16 * UNIT
        assert arena.taken_bytes == sum(-(-extent.view.numel() // UNIT) * UNIT for extent, _ in held)
    for extent, _ in held:
        arena.give(extent, None)
    assert block_bytes or arena.take(16 * UNIT) is not None


def test_memory_that_comes_later_is_allocated_by_who_looks_first():
    made, refuse = [], [True]

    def empty(nbytes):
        if refuse.pop() if refuse else False:
            raise RuntimeError("refused")
        made.append((nbytes, threading.get_ident()))
        return torch.empty(nbytes, dtype=torch.uint8)

    arena = Arena(empty, later=True)
    arena.resize(4 * UNIT, 2 * UNIT)
    first, second = arena.take(UNIT), arena.take(UNIT)
    assert arena.nbytes == 2 * UNIT and not made
    with pytest.raises(RuntimeError, match="refused"):
        _ = first.view  # and the next who looks tries again
    looking = [threading.Thread(target=lambda: second.view.fill_(2)), threading.Thread(target=lambda: first.view)]
    for thread in looking:
        thread.start()
    for thread in looking:
        thread.join(10)
    assert len(made) == 1 and made[0][0] == 2 * UNIT and made[0][1] != threading.get_ident()
    first.view.fill_(1)
    assert bool((second.view == 2).all())


def test_small_blocks_that_are_idle_give_way_to_a_large_one():
    log = []
    arena = arena_of(4, block_bytes=UNIT)
    small = [arena.take(UNIT) for _ in range(4)]
    for number, extent in enumerate(small[:3]):
        arena.give(extent, Use(number, log))
    assert arena.take(4 * UNIT) is None
    assert log == []
    assert arena.take(3 * UNIT).view.numel() == 3 * UNIT
    assert log == [0, 1, 2]
    assert arena.nbytes == 4 * UNIT
