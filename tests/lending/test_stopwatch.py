"""The seconds of a step's bundles, from events of a device."""

import pytest

from spillway.ops.lending.stopwatch import Stopwatch


class Event:
    def __init__(self, at):
        self.at = at

    def synchronize(self):
        pass


class Clock:
    """A backend whose events happen `now`."""

    now = 0.0

    def timer(self, stream):
        return Event(self.now)

    @staticmethod
    def seconds_between(start, end):
        return end.at - start.at


class Bundle:
    def __init__(self, name, nbytes=1):
        self.name, self.nbytes = name, nbytes


BUNDLES = [Bundle("blocks.0.a"), Bundle("blocks.0.b"), Bundle("blocks.1.a"), Bundle("blocks.1.b"), Bundle("out")]
SECONDS = [5.0, 1.0, 2.0, 4.0, 7.0]


def step(watch, clock):
    for one, seconds in zip(BUNDLES, SECONDS, strict=True):
        watch.end()
        watch.begin(one)
        clock.now += seconds
    return list(watch.seconds().values())


@pytest.mark.parametrize(("disturbed", "wanted"), [(False, SECONDS), (True, [2.0, 1.0, 2.0, 1.0, 7.0])])
def test_the_fastest_of_like_bundles_counts_where_a_step_was_disturbed(disturbed, wanted):
    """A kernel that is launched late, as memory is being locked, makes its bundle look slow."""
    clock = Clock()
    watch = Stopwatch(clock)
    assert not watch.has_marks
    watch.disturbed = disturbed
    assert step(watch, clock) == wanted and watch.has_marks


def test_bundles_of_another_size_are_not_alike():
    clock = Clock()
    watch = Stopwatch(clock)
    watch.disturbed = True
    for one, seconds in ((Bundle("blocks.0.a", 1), 5.0), (Bundle("blocks.1.a", 2), 1.0)):
        watch.end()
        watch.begin(one)
        clock.now += seconds
    assert list(watch.seconds().values()) == [5.0, 1.0]


MIB = 1 << 20


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        ([], None),
        ([(MIB - 1, 0.0, 1.0)], None),
        ([(8 * MIB, 0.0, 2.0), (8 * MIB, 3.0, 5.0)], 4 * MIB),
        # One waits for the other, as both streams have one bus.
        ([(8 * MIB, 0.0, 2.0), (8 * MIB, 0.1, 4.0), (8 * MIB, 2.0, 6.0)], 4 * MIB),
        ([(8 * MIB, 0.1, 4.0), (8 * MIB, 0.0, 4.0)], 4 * MIB),
        # A transfer that waited for its memory says nothing.
        ([(8 * MIB, 0.0, 2.0), (8 * MIB, 3.0, 5.0), (8 * MIB, 6.0, 36.0)], 4 * MIB),
    ],
)
def test_transfers_that_overlap_take_turns_on_the_bus(sent, wanted):
    watch = Stopwatch(Clock())
    for nbytes, start, end in sent:
        watch.sent(nbytes, Event(start), Event(end))
    assert watch.bus() == wanted
