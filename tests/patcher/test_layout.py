"""What stays on the device is chosen by the time of a step, and moves without being brought again."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kit.nets import Stack, dynamic, plain, same, steady, write
from kit.sim_device import SimDevice
from spillway.patcher.layout import Layouts
from spillway.patcher.load_plan import by_bytes, plan_load
from spillway.patcher.step_time import Pace, spread_over_time, step_seconds

UNIT = 512
BUS = 1.0 * UNIT  # one unit a second
ALL = 1 << 40


@dataclass(eq=False)
class Part:
    """A bundle as far as a plan looks at it."""

    units: int
    name: str = ""
    nbytes: int = field(init=False)
    transfer_bytes: int = field(init=False)

    def __post_init__(self):
        self.nbytes = self.transfer_bytes = self.units * UNIT


def model(*parts):
    """(bundles, pace) of (units, seconds)."""
    bundles = [Part(units) for units, _ in parts]
    return bundles, Pace({b: seconds for b, (_, seconds) in zip(bundles, parts, strict=True)}, BUS)


def step(bundles, pace, resident=(), window=ALL):
    return step_seconds(bundles, set(resident), window, pace)


some = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12)


@steady
@given(parts=some)
def test_a_step_without_any_limit_takes_the_longer_of_both(parts):
    bundles, pace = model(*parts)
    units, seconds = (sum(column) for column in zip(*parts, strict=True))
    # What comes first in a step comes behind the last of the step before only if that leaves time to.
    assert max(units, seconds) <= step(bundles, pace) <= units + seconds
    assert step(bundles, pace, resident=bundles) == seconds


@steady
@given(parts=some, window=st.integers(1, 40))
def test_a_step_is_never_shorter_for_a_smaller_window(parts, window):
    bundles, pace = model(*parts)
    assert step(bundles, pace, window=window * UNIT) >= step(bundles, pace, window=(window + 5) * UNIT) - 1e-9


def test_a_window_of_one_bundle_hides_nothing():
    bundles, pace = model((3, 2), (3, 2), (3, 2))
    assert step(bundles, pace, window=3 * UNIT) == 15
    assert step(bundles, pace, window=6 * UNIT) == 9


@steady
@given(
    parts=st.lists(st.tuples(st.integers(40, 90), st.integers(0, 9)), min_size=4, max_size=40), count=st.integers(1, 9)
)
def test_an_order_over_time_has_every_bundle_once(parts, count):
    bundles, pace = model(*parts)
    order = spread_over_time(bundles, lambda bundle: bundle.nbytes, pace, count, 0)
    assert sorted(map(id, order)) == sorted(map(id, bundles))


# Ten large layers that compute nothing, then ten that compute for as long as all transfers take.
UNEVEN = [(90, 0.0)] * 10 + [(90, 180.0)] * 10


def layouts(bundles, budget):
    def plan(addresses, window):
        return plan_load(addresses, budget, window, lambda bundle: bundle.nbytes)

    return Layouts(bundles, bundles, plan, lambda bundle: bundle.nbytes, None)


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_what_stays_is_what_would_be_waited_for(share):
    bundles, pace = model(*UNEVEN)
    found = layouts(bundles, int(share * 1800 * UNIT))
    best, even = found.best(pace), found.expected(found.plain(), 4, pace)
    # Nine tenths of the wait for the bus are gone.
    assert best.seconds - 1800 <= (even.seconds - 1800) / 10 + 90
    assert best.seconds < even.seconds
    assert f"computes {1800.0:.2f} s" in found.in_words(best, pace)


def test_a_wait_is_said():
    bundles, pace = model(*[(90, 9.0)] * 20)
    found = layouts(bundles, 900 * UNIT)
    said = found.in_words(found.best(pace), pace)
    assert "waits" in said and "more would hide it" in said
    assert "comes behind it" in found.in_words(
        found.expected(bundles, 4, Pace({b: 900.0 for b in bundles}, BUS)), Pace({b: 900.0 for b in bundles}, BUS)
    )


@steady
@given(parts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=4, max_size=12), share=st.floats(0, 1))
def test_what_is_said_to_hide_a_wait_hides_it(parts, share):
    bundles, pace = model(*parts)
    computing, budget = sum(seconds for _, seconds in parts), int(share * sum(b.nbytes for b in bundles))
    best = layouts(bundles, budget).best(pace)
    more = layouts(bundles, budget).missing_bytes(best, pace)
    now = layouts(bundles, budget).plan(best.addresses, by_bytes(best.window)).resident
    stays, room = list(best.addresses[:now]), more
    for bundle in best.addresses[now:]:
        room -= bundle.nbytes
        if room >= 0:
            stays.append(bundle)
    window = by_bytes(best.window)([bundle.nbytes for bundle in bundles if bundle not in stays])
    assert step(bundles, pace, stays, window) <= 1.01 * computing
    assert more > 0 or best.seconds <= 1.01 * computing


def test_what_is_there_stays_where_moving_it_does_not_pay():
    """A step that waits for the bus is nearly as long whichever bundles stay."""
    bundles, pace = model(*[(90, 20.0)] * 20)
    found = layouts(bundles, 900 * UNIT)
    now = found.expected(bundles[::-1], 4, pace)
    assert found.best(pace).seconds < found.best(pace, now).seconds < now.seconds
    assert list(found.best(pace, now).addresses) == bundles[::-1], "only the window is another one"
    # Where those that compute stay, the next step brings what it has to, and each one after it gains more than that.
    bundles, pace = model(*UNEVEN)
    found = layouts(bundles, 900 * UNIT)
    now = found.expected(bundles[::-1], 4, pace)
    best = found.best(pace, now)
    assert best.seconds < 0.9 * now.seconds and set(best.addresses[:5]) <= set(bundles[:10])


def test_small_windows_come_first_among_equals():
    bundles, pace = model(*[(9, 900.0)] * 20)
    assert layouts(bundles, 90 * UNIT).best(pace).window == 2
    assert by_bytes(2)([5 * UNIT, UNIT, 3 * UNIT]) == 8 * UNIT


# Moving


class Timed(SimDevice):
    """Says of each layer that it took as long as the test likes."""

    seconds = 1.0

    def timer(self, stream):
        return self.record(stream)

    def seconds_between(self, start, end):
        return self.seconds


class Backwards(Stack):
    """Runs in the other order than it is registered in."""

    def forward(self, x):
        for layer in reversed(self.layers):
            x = torch.tanh(x + layer(x))
        return x


@pytest.mark.parametrize("device", [SimDevice, Timed, None])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_what_stays_in_both_layouts_is_not_brought_again(tmp_path, device, stored, share):
    path, depth = tmp_path / "m.safetensors", 20
    state = write(path, Backwards(depth), stored)
    options = {} if device is None else {"device": device()}
    made = dynamic(lambda: Backwards(depth), path, torch.float32, pinned_bytes=0, **options)
    made.set_policy(made.policy.with_changes(vram_bytes=int(share * made.total_bytes)))
    reference = plain(lambda: Backwards(depth), state, torch.float32)
    right = reference(reference.input())
    assert same(made(made.module.input()), right)
    before = {bundle for bundle in made.bundles if made.residency.is_resident(bundle)}
    for _ in range(4):
        loaded = made.ledger.counters.bytes_loaded
        assert same(made(made.module.input()), right)
        after = {bundle for bundle in made.bundles if made.residency.is_resident(bundle)}
        new = after - before
        gained = made.ledger.counters.bytes_loaded - loaded
        assert gained in (sum(b.nbytes for b in new), sum(b.source_bytes for b in new))
        before = after
    assert made.resident_bytes + made.buffer_bytes <= share * made.total_bytes


def test_a_patch_that_changes_sizes_brings_no_other_bundle_again(tmp_path):
    path, depth = tmp_path / "m.safetensors", 8
    write(path, Stack(depth))
    made = dynamic(lambda: Stack(depth), path, device=SimDevice(), pinned_bytes=0)
    for _ in range(2):
        made(made.module.input())

    class Wider:
        shape = (130, 128)

        def __call__(self, weight):
            return torch.cat([weight, weight[:2]])

    loaded = made.ledger.counters.bytes_loaded
    made.set_patches({"layers.3.weight": Wider()})
    with pytest.raises(RuntimeError):  # the layer is not made for it
        made(made.module.input())
    assert made.ledger.counters.bytes_loaded - loaded == made.bundles[3].source_bytes


def test_modulation_stays_first_where_nobody_has_timed_a_step():
    """It has much to bring and nothing to compute, in every block."""
    bundles, _ = model(*[(90, 0)] * 40)
    for number, bundle in enumerate(bundles):
        bundle.name = f"blocks.{number // 2}.{('img_mod.lin', 'mlp.0')[number % 2]}"
    first = layouts(bundles, 900 * UNIT).guessed()[:16]
    assert all("mod" in bundle.name for bundle in first)
    assert len({int(bundle.name.split(".")[1]) // 5 for bundle in first[:4]}) == 4, "spread over the step"
    for bundle in bundles:
        bundle.name = bundle.name.replace("img_mod", "attn")
    found = layouts(bundles, 900 * UNIT)
    assert found.guessed() == found.plain()
