"""Under `ulimit -v` and `ulimit -d` the output cache gives way, and then an error names the limit and what to do."""

import json
import os
import subprocess
import sys

import pytest

from kit.pack import ROOT
from spillway.ops.ram import shortage

SCRIPT = ROOT / "tests" / "kit" / "processes" / "refused_memory.py"
linux = pytest.mark.skipif(sys.platform != "linux", reason="no other system keeps these limits")
ADDRESSES, PRIVATE = "the limit of address space (ulimit -v) of ", "the limit of private memory (ulimit -d) of "


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    # Where threads ask at once, glibc reserves 64 MiB of addresses for each: on a busy machine those would be missing.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@linux
def test_the_limits_count_as_available_memory(said):
    available, is_total, words, remedy = said["addresses"]
    assert 190 <= available <= 200 and is_total and f"free of {ADDRESSES}" in words and "higher `ulimit -v`" in remedy
    available, reason, options = said["private"]
    assert 90 <= available <= 100 and reason.startswith(PRIVATE) and options == ["-d"]


@linux
@pytest.mark.parametrize(
    ("what", "subject", "limit"),
    [
        ("map", "large.safetensors: mapping this file needs 600.0 MiB", ADDRESSES),
        ("read", "large.safetensors: mapping this file needs 600.0 MiB", ADDRESSES),
        ("weight", "a weight needs 400.0 MiB", ADDRESSES),
        ("forward", "'layer' needs 400.0 MiB", ADDRESSES),
        ("private weight", "a weight needs 400.0 MiB", PRIVATE),
    ],
)
def test_an_error_names_what_the_limit_and_the_remedy(said, what, subject, limit):
    words = said[what]
    assert words.startswith("OutOfRAM: ") and subject in words and "which the system refuses" in words
    option = "-v" if limit is ADDRESSES else "-d"
    assert f"left of {limit}" in words and f"Start ComfyUI with a higher `ulimit {option}`" in words


@linux
def test_what_fits_goes_on_working(said):
    assert said["smaller forward"] is False and said["small map"] == "done"


@linux
def test_cached_images_give_way_to_a_model(said):
    assert said["small map after images"] == "done"
    left, decision = said["cache"]
    assert 0 < left < 8 and "evicted" in decision and f"memory was refused by {ADDRESSES}" in decision
    assert said["cached"] == 0, "who holds the cache's lock may need one that is held here"


@linux
def test_a_map_that_would_take_most_of_the_private_memory_is_for_reading(said):
    assert said["large map"] is True and said["map of more than half"] is True
    assert said["small map to write in"] is False


def test_other_errors_pass_at_once():
    calls = []

    def fail():
        calls.append(1)
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        shortage.obtain(fail, 1, "it")
    assert calls == [1]


def test_holders_give_way_in_turn_and_only_as_far_as_needed():
    class Holder:
        def __init__(self, has):
            self.has = has

        def give_ram(self, nbytes):
            given = min(self.has, nbytes)
            self.has -= given
            return given

    before = list(shortage._holders)
    try:
        shortage._holders.clear()
        holders = [Holder(10), Holder(10), Holder(10)]
        for holder in holders:
            shortage.register(holder)
        del holder
        assert shortage.give_way(15) == 15 and [one.has for one in holders] == [0, 5, 10]
        del holders[1]
        assert shortage.give_way(100) == 10
    finally:
        shortage._holders[:] = before
