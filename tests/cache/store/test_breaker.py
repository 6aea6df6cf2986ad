"""When a store that fails is asked, and how long a prompt waits."""

import pytest

from spillway.cache.store.breaker import LONGEST_PAUSE, PAUSE_SECONDS, Breaker
from spillway.cache.store.waiting import Waiting


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_it_opens_after_three_failures_in_a_row_or_a_dear_one(clock):
    breaker = Breaker(clock)
    assert [breaker.failed("x") for _ in range(2)] == [False, False] and breaker.allows()
    assert not breaker.succeeded()
    assert [breaker.failed("x") for _ in range(3)] == [False, False, True]
    assert not breaker.allows() and breaker.why == "x"
    assert Breaker(clock).failed("y", at_once=True)


def test_one_tries_after_a_pause_and_each_pause_is_longer(clock):
    breaker = Breaker(clock)
    breaker.failed("x", at_once=True)
    pause = PAUSE_SECONDS
    for _ in range(8):
        clock.now += pause - 0.1
        assert not breaker.allows()
        clock.now += 0.2
        assert breaker.allows() and not breaker.allows(), "one alone"
        assert not breaker.failed("x", at_once=True)
        pause = min(2 * pause, LONGEST_PAUSE)
    clock.now += LONGEST_PAUSE
    assert breaker.allows()
    breaker.given_up()
    assert breaker.allows() and breaker.succeeded() and breaker.allows() and breaker.why is None


def test_failures_that_were_under_way_make_no_pause_longer(clock):
    breaker = Breaker(clock)
    for _ in range(20):
        breaker.failed("x", at_once=True)
    clock.now += PAUSE_SECONDS
    assert breaker.allows()


def test_waits_at_the_same_time_count_once_and_what_they_save_is_given_back(clock):
    waiting = Waiting(5.0, clock)
    with waiting.counted():
        clock.now += 1
        with waiting.counted():
            clock.now += 1
            assert waiting.left == 3.0
        clock.now += 1
    clock.now += 10
    assert waiting.spent == 3.0
    waiting.saved(2.0)
    assert waiting.left == 4.0
    waiting.saved(99.0)
    assert waiting.left == 5.0
    with waiting.counted():
        clock.now += 50
    assert waiting.left == 0.0
