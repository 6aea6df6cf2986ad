"""The choice of what to evict: enough, no more than needed, and the least loss; fast with ten thousand entries."""

import random
import statistics
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spillway.cache.choose import Candidates
from spillway.cache.choose import choose as choose_places


def candidate(name, freed, seconds, **options):
    return {"entries": (name,), "freed": freed, "seconds": seconds, **options}


def choose(listed, short):
    """The chosen, in the order of the choice."""
    candidates = Candidates()
    for one in listed:
        candidates.add(**one)
    return [listed[place] for place in choose_places(candidates, short)]


def names(chosen):
    return [one["entries"][0] for one in chosen]


def test_the_cheapest_per_byte_goes():
    model, image = candidate("model", 6000, 10), candidate("image", 12, 30)
    assert names(choose([model, image], 5000)) == ["model"]


def test_what_is_freed_beyond_the_shortage_helps_nobody():
    model, image = candidate("model", 6000, 10), candidate("image", 12, 3)
    assert names(choose([model, image], 10)) == ["image"]


def test_age_makes_expendable():
    new, old = candidate("new", 100, 10, age=1), candidate("old", 100, 20, age=8)
    assert names(choose([new, old], 100)) == ["old"]


def test_what_the_running_prompt_used_goes_later():
    now, before = candidate("now", 100, 10, age=0), candidate("before", 100, 20, age=1)
    assert names(choose([now, before], 100)) == ["before"]


def test_kinds_that_were_never_used_again_go_first():
    loader, picture = candidate("loader", 100, 5, chance=1.0), candidate("picture", 100, 20, chance=0.05)
    assert names(choose([loader, picture], 100)) == ["picture"]


def test_what_is_needed_goes_only_when_nothing_else_can():
    needed, other = candidate("needed", 1000, 0.1, needed=True), candidate("other", 400, 100)
    assert names(choose([needed, other], 300)) == ["other"]
    assert set(names(choose([needed, other], 600))) == {"needed", "other"}


def test_a_large_one_chosen_late_spares_the_small_ones():
    small = [candidate(f"small {i}", 10, 0.001) for i in range(10)]
    large = candidate("large", 10_000, 50)
    assert names(choose([*small, large], 5000)) == ["large"]


def test_nothing_frees_nothing():
    assert choose([candidate("empty", 0, 1)], 100) == []
    assert choose([], 100) == []


many = st.lists(
    st.tuples(st.integers(1, 10_000), st.floats(0, 100), st.integers(0, 20), st.booleans()), min_size=1, max_size=40
)


@settings(max_examples=200, deadline=None)
@given(many, st.integers(1, 100_000))
def test_enough_and_nothing_needless(specs, short):
    candidates = [candidate(i, freed, s, age=age, needed=n) for i, (freed, s, age, n) in enumerate(specs)]
    chosen = choose(candidates, short)
    freed, total = sum(one["freed"] for one in chosen), sum(one["freed"] for one in candidates)
    assert freed >= min(short, total)
    assert len(set(names(chosen))) == len(chosen)
    spare = sum(one["freed"] for one in candidates if not one["needed"])
    if spare >= short:
        assert not any(one["needed"] for one in chosen)
        assert all(freed - one["freed"] < short for one in chosen), "one of them could have stayed"


@pytest.mark.parametrize("share", [0.001, 0.5])
def test_ten_thousand_candidates_are_chosen_from_in_time(share):
    """The bound of 20 ms is checked by the benchmark; here with room for a busy machine."""
    rng = random.Random(1)
    pool = [candidate(i, rng.randrange(1, 1000), rng.random() * 30, age=rng.randrange(30)) for i in range(10_000)]
    candidates = Candidates()
    for one in pool:
        candidates.add(**one)
    short, times = sum(candidates.freed) * share, []
    for _ in range(5):
        begun = time.process_time()
        choose_places(candidates, short)
        times.append(time.process_time() - begun)
    assert statistics.median(times) < 0.25
