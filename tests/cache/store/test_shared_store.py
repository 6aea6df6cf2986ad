"""A store that several machines share: what comes back is what was written, or nothing, and nobody waits long."""

import asyncio
import os
import random
import subprocess
import sys
import threading
import time

import pytest
import torch

from kit.faulty_store import fresh_faults
from kit.pack import ROOT
from spillway.cache.disk_format import describe, read_record, write
from spillway.cache.store import shared_store
from spillway.cache.store.place import FOLDER, PARTIAL, PREFIX, RANGE
from spillway.cache.store.shared_store import Options, SharedStore
from spillway.ops.ledger import Ledger

MIB = 1 << 20
KEY = "correct horse"
ENTRY = 420  # bytes of one with a tensor of 50
NAMES = [f"{number:064x}" for number in range(32)]


faults = pytest.fixture(autouse=True)(fresh_faults)


def member(tmp_path, protocol="file", **options):
    return SharedStore(Options(f"{protocol}://{tmp_path}", **options), Ledger("shared store"))


def put(store, name, outputs, stamps=None):
    return store.store(
        store.name(name), describe(outputs), seconds=20.0, kind="Node", stamps=stamps, stop=lambda: False
    )


def get(store, name):
    found = asyncio.run(store.load(store.name(name)))
    return found and found[0]


def entries(tmp_path):
    return sorted((tmp_path / FOLDER).glob("*/*.output"))


def a_tensor(size=64):
    return [[torch.arange(size, dtype=torch.uint8)]]


@pytest.mark.parametrize("protocol", ["file", "far", "share"])
def test_what_comes_back_is_what_was_written(tmp_path, protocol, faults):
    image, text = torch.rand(1, 8, 8, 3), torch.randn(1, 77, 16, dtype=torch.bfloat16)
    large = torch.randint(0, 255, (RANGE * 2 + 7,), dtype=torch.uint8)
    outputs = [[image, image[:, ::2]], [[[text, {"pooled_output": None, "strength": 0.5}]]], [large]]
    assert put(member(tmp_path, protocol), NAMES[1], outputs, [["file", "x", "y"]])
    found, seconds, stamps = asyncio.run(member(tmp_path, protocol).load(NAMES[1]))
    assert torch.equal(found[0][0], image) and torch.equal(found[0][1], image[:, ::2])
    assert torch.equal(found[2][0], large)
    assert torch.equal(found[1][0][0][0], text) and found[1][0][0][1] == {"pooled_output": None, "strength": 0.5}
    assert seconds == 20.0 and stamps == [["file", "x", "y"]]
    assert faults.calls.count("cat_file") == (0 if protocol == "file" else 4), "its end, and three large ranges"
    stranger = member(tmp_path, protocol)
    assert [get(stranger, name) for name in NAMES[2:8]] == [None] * 6 and stranger.state is None
    assert not asyncio.run(stranger.there(NAMES[2])) and not stranger.place.remove(str(tmp_path / "x"))
    assert not list(tmp_path.glob(f"{FOLDER}/*/{PREFIX}*"))


# --- what was changed -------------------------------------------------------------------------------------------------


def flipped(place):
    def change(path):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)

    return change


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "its beginning": flipped(2),
    "a number": flipped(40),
    "its JSON": flipped(120),
    "its end": flipped(-1),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "empty": lambda path: path.write_bytes(b""),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": a_pipe,
}


@pytest.mark.parametrize("protocol", ["file", "share"])
@pytest.mark.parametrize("how", DAMAGE)
def test_what_is_damaged_is_not_used_and_is_written_anew(tmp_path, how, protocol):
    if how == "a pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("there are no pipes with names here")
    store = member(tmp_path, protocol)
    assert put(store, NAMES[1], a_tensor())
    (path,) = entries(tmp_path)
    DAMAGE[how](path)
    assert get(store, NAMES[1]) is None and store.counts.refused == 1
    assert entries(tmp_path) == [path], "it may be another member's, and right for them"
    if how == "a folder":
        assert not put(store, NAMES[1], a_tensor())
        return
    assert put(store, NAMES[1], a_tensor())
    assert torch.equal(get(store, NAMES[1])[0][0], a_tensor()[0][0])


def test_what_was_sealed_with_another_key_is_not_used(tmp_path):
    """Nor where it lies under the right name, which anybody can see in the store."""
    ours, theirs, nobodys = (member(tmp_path, key=key) for key in (KEY, "another one", ""))
    assert put(ours, NAMES[1], a_tensor())
    assert [get(one, NAMES[1]) is not None for one in (ours, theirs, nobodys)] == [True, False, False]
    assert get(member(tmp_path, key=KEY), NAMES[1]) is not None, "the same key on another machine"
    (path,) = entries(tmp_path)
    about = {"name": path.stem, "kind": "Node", "seconds": 20.0, "stamps": None}
    for forger in (theirs, nobodys):
        with open(path, "wb") as file:
            write(file, describe([[torch.zeros(64)]]), about, seal=forger._seal)
        fresh = member(tmp_path, key=KEY)
        assert get(fresh, NAMES[1]) is None and fresh.counts.refused == 1
    assert put(ours, NAMES[1], a_tensor()) is False, "it has not seen that it was forged"
    assert get(ours, NAMES[1]) is None and put(ours, NAMES[1], a_tensor()) and get(ours, NAMES[1]) is not None


def test_members_of_two_keys_do_not_take_each_others_places(tmp_path):
    both = [member(tmp_path, key=key) for key in (KEY, "another one")]
    assert all(put(one, NAMES[1], a_tensor(size)) for one, size in zip(both, (64, 65), strict=True))
    assert [get(one, NAMES[1])[0][0].numel() for one in both] == [64, 65]


def test_an_entry_that_was_copied_to_another_name_is_not_used(tmp_path):
    store = member(tmp_path, key=KEY)
    assert put(store, NAMES[1], a_tensor())
    (path,) = entries(tmp_path)
    other = store.place.address.removeprefix("file://") + f"/{FOLDER}/{store.name(NAMES[2])[:2]}"
    os.makedirs(other, exist_ok=True)
    with open(f"{other}/{store.name(NAMES[2])}.output", "wb") as file:
        file.write(path.read_bytes())
    assert get(store, NAMES[2]) is None and store.counts.refused == 1


# --- a store that fails -----------------------------------------------------------------------------------------------


def timed(work):
    begun = time.monotonic()
    found = asyncio.run(work)
    return found, time.monotonic() - begun


async def ask_for(store, count):
    store.begin_prompt()
    return await asyncio.gather(*(store.there(name) for name in NAMES[:count]), store.load(NAMES[1]))


@pytest.mark.parametrize("how", ["slow", "hangs"])
@pytest.mark.parametrize("protocol", ["faulty", "far"])
def test_nobody_waits_longer_than_the_limit(tmp_path, faults, how, protocol):
    """Twenty questions of one prompt: all of them together. The next prompts ask nothing, until a pause is over."""
    store = member(tmp_path, protocol, wait_seconds=0.4)
    assert put(store, NAMES[1], a_tensor())
    if how == "slow":
        faults.slow = 5.0
    else:
        faults.hangs.set()
    found, seconds = timed(ask_for(store, 20))
    assert found == [False] * 20 + [None] and 0.3 < seconds < 3.0
    assert store.state == "no answer within 0.4 s" and store.counts.late >= 1
    asked = len(faults.calls)
    assert timed(ask_for(store, 20))[1] < 2.0 and len(faults.calls) == asked
    faults.slow = 0.0
    faults.hangs.clear()
    time.sleep(0.1)
    store.reads._again = 0.0
    assert timed(ask_for(store, 1))[0][0] is False, "one question tries whether it answers"
    assert store.state is None and asyncio.run(ask_for(store, 2))[2] is not None


def test_answers_that_come_in_time_add_up_to_the_limit(tmp_path, faults):
    store = member(tmp_path, "faulty", wait_seconds=0.4)
    assert put(store, NAMES[1], a_tensor())
    faults.slow = 0.15

    async def one_after_the_other():
        return [await store.there(name) for name in NAMES[2:22]]

    assert timed(one_after_the_other())[1] < 2.0


def test_what_takes_too_long_to_read_is_not_tried_at_each_prompt(tmp_path, faults):
    store = member(tmp_path, "far", wait_seconds=1.0)
    assert put(store, NAMES[1], a_tensor())
    faults.slow = 0.8  # to say that it is there, and as long again to give it
    assert asyncio.run(store.there(NAMES[1]))
    store.begin_prompt()
    assert asyncio.run(store.load(NAMES[1])) is None and store.counts.late == 1
    faults.slow = 0.0
    store.begin_prompt()
    store.reads.succeeded()
    assert not asyncio.run(store.there(NAMES[1])) and asyncio.run(store.load(NAMES[1])) is not None


def test_what_is_found_is_worth_its_wait(tmp_path, faults):
    store = member(tmp_path, "faulty", wait_seconds=1.0)
    for name in NAMES[:4]:
        assert put(store, name, a_tensor())
    faults.slow = 0.2

    async def one_after_the_other():
        return [await store.load(name) for name in NAMES[:4]]

    found, seconds = timed(one_after_the_other())
    assert None not in found and seconds > 1.0 and store.waiting.spent == 0.0


TROUBLE = {
    "read-only": lambda faults: setattr(faults, "read_only", True),
    "full": lambda faults: setattr(faults, "full", True),
    "no driver's error": lambda faults: setattr(faults, "broken", RuntimeError("credentials")),
}


@pytest.mark.parametrize("protocol", ["faulty", "far"])
@pytest.mark.parametrize("how", TROUBLE)
def test_what_cannot_be_written_is_said_once_and_fails_nobody(tmp_path, faults, how, protocol, caplog):
    store = member(tmp_path, protocol)
    assert put(store, NAMES[0], a_tensor())
    TROUBLE[how](faults)
    assert [put(store, name, a_tensor(4096)) for name in NAMES[1:20]] == [False] * 19
    assert caplog.text.count("cannot be written to") == 1 and "nothing is written there for a while" in caplog.text
    assert len(faults.calls) < 30, "it is not asked again and again"
    left = [path for path in tmp_path.glob(f"{FOLDER}/*/*") if path.suffix != ".output"]
    assert not left and len(entries(tmp_path)) == 1, "nothing half is left"
    if how != "no driver's error":
        assert get(store, NAMES[0]) is not None, "what can be read is read"


def test_a_place_that_has_gone_is_not_made_anew(tmp_path, caplog):
    """A network drive that is not mounted: the folder would be made on this machine's disk."""
    store = member(tmp_path / "mount")
    assert not any(put(store, name, a_tensor()) for name in NAMES[:5])
    assert get(store, NAMES[0]) is None and "does not exist" in caplog.text
    assert not (tmp_path / "mount").exists()


@pytest.mark.parametrize("address", ["s3.not://bucket", "nothing-like-it://x"])
def test_a_driver_that_is_missing_is_named(address, caplog):
    store = SharedStore(Options(address), Ledger("shared store"))
    assert get(store, NAMES[0]) is None and not put(store, NAMES[0], a_tensor())
    assert "nothing that is installed can open this address" in caplog.text and "pip install" in caplog.text


def test_no_secret_is_told(tmp_path, faults, caplog):
    store = SharedStore(Options(f"far://me:s3cr3t@{tmp_path}", key=KEY), Ledger("shared store"))
    faults.broken = OSError(f"no route to far://me:s3cr3t@{tmp_path}")
    for name in NAMES[:5]:
        put(store, name, a_tensor())
    told = f"{caplog.text} {store.as_dict()} {store.options}"
    assert "no route to" in told and KEY not in told and caplog.text.count("s3cr3t") == 0


# --- several members --------------------------------------------------------------------------------------------------


def aged(path, days):
    then = time.time() - days * 86400
    os.utime(path, (then, then))


def test_what_is_too_much_or_too_old_goes_and_nothing_else(tmp_path):
    foreign = [tmp_path / "notes.txt", tmp_path / FOLDER / "00" / "x.output", tmp_path / FOLDER / "readme"]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(8 * MIB))
        aged(path, 1000)
    keeper = member(tmp_path)
    for name in NAMES[:6]:
        assert put(keeper, name, [[torch.zeros(MIB, dtype=torch.uint8)]])
    for number, path in enumerate(entries(tmp_path)[1:]):
        aged(path, 20 - number)
    aged(entries(tmp_path)[1], 40)
    dead, alive = (tmp_path / FOLDER / "00" / f"{PREFIX}{digit * 16}{PARTIAL}" for digit in "ab")
    for path in (dead, alive):
        path.write_bytes(bytes(100))
    aged(dead, 2)
    evicting = member(tmp_path, cap=int(5.5 * MIB), days=30.0)
    assert put(evicting, NAMES[9], [[torch.zeros(MIB, dtype=torch.uint8)]])
    left = {path.stem for path in entries(tmp_path) if path not in foreign}
    assert left == {NAMES[0], NAMES[4], NAMES[5], NAMES[9]}, "one is too old, and two were the oldest: room is made"
    assert all(path.exists() for path in foreign) and alive.exists() and not dead.exists()
    assert evicting.counts.evicted == 4


def test_a_full_store_in_which_nothing_may_be_removed_is_not_listed_again_and_again(tmp_path, faults, caplog):
    store = member(tmp_path, "faulty", cap=5 * MIB // 2)
    faults.keeps = True
    done = [put(store, name, [[torch.zeros(MIB, dtype=torch.uint8)]]) for name in NAMES[:20]]
    assert done == [True] * 2 + [False] * 18 and faults.calls.count("find") == 3
    assert caplog.text.count("is full, and nothing in it can be removed") == 1 and store.state is None


def test_a_member_whose_clock_is_wrong_removes_nothing(tmp_path):
    store = member(tmp_path, days=30.0)
    for name in NAMES[:3]:
        assert put(store, name, a_tensor())
    for path in entries(tmp_path):
        aged(path, 400)  # as they look to one whose clock is ahead
    assert put(member(tmp_path, days=30.0), NAMES[5], a_tensor()) and len(entries(tmp_path)) == 4


def test_two_that_evict_at_once_and_one_that_reads(tmp_path, monkeypatch):
    """Both choose of the same listing. The reader has opened an entry that goes meanwhile."""
    writer = member(tmp_path)
    for number, name in enumerate(NAMES[:10]):
        assert put(writer, name, [[torch.full((MIB,), number, dtype=torch.uint8)]])
    for number, path in enumerate(entries(tmp_path)):
        aged(path, 10 - number)
    both = [member(tmp_path, cap=6 * MIB) for _ in range(2)]
    together = threading.Barrier(2)
    for one in both:
        listed = one.place.files
        monkeypatch.setattr(one.place, "files", lambda listed=listed: (listed(), together.wait(20))[0])
    read_outputs = shared_store.read_outputs

    def slowly(file, record):
        threads = [threading.Thread(target=one._make_room, args=(MIB,)) for one in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return read_outputs(file, record)

    monkeypatch.setattr(shared_store, "read_outputs", slowly)
    assert torch.equal(get(writer, NAMES[0])[0][0], torch.zeros(MIB, dtype=torch.uint8))
    kept = int(sys.platform == "win32")  # what is being read cannot be removed there
    assert sum(one.counts.evicted for one in both) == 6 - kept and len(entries(tmp_path)) == 4 + kept, "none went twice"


def test_two_writers_of_one_entry(tmp_path):
    """Whoever is last takes its place, as a whole."""
    results = []
    together = threading.Barrier(4)

    def one():
        store = member(tmp_path)
        together.wait(20)
        results.append(put(store, NAMES[1], [[torch.ones(4 * MIB, dtype=torch.uint8)]]))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(results) and len(results) == 4
    assert int(get(member(tmp_path), NAMES[1])[0][0].sum()) == 4 * MIB
    assert len(list(tmp_path.glob(f"{FOLDER}/*/*"))) == 1


def test_a_member_that_is_killed_while_it_writes(tmp_path):
    """Nobody reads what it left, and whoever makes the same writes it."""
    command = [sys.executable, "tests/kit/processes/write_shared_store.py", str(tmp_path), NAMES[1]]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "writing\n"
        end = time.monotonic() + 60
        while not any(path.stat().st_size for path in tmp_path.glob(f"{FOLDER}/*/{PREFIX}*{PARTIAL}")):
            assert time.monotonic() < end and other.poll() is None
            time.sleep(0.01)
    finally:
        other.kill()
        other.communicate()
    (left,) = tmp_path.glob(f"{FOLDER}/*/*")
    store = member(tmp_path, cap=1 << 40)
    assert left.suffix == PARTIAL and get(store, NAMES[1]) is None and store.counts.refused == 0
    assert put(store, NAMES[1], a_tensor()) and get(store, NAMES[1]) is not None and left.exists()
    aged(left, 2)
    store._listed -= 1e6
    assert put(store, NAMES[2], a_tensor()) and not left.exists(), "after a day it is nobody's"


def take_part(tmp_path, number, count, cap, errors, evicted):
    """Write some entries and read what anybody wrote, within a cap that nobody keeps alone."""
    store, picks = member(tmp_path, key=KEY, cap=cap), random.Random(number)
    for turn in range(count):
        value = picks.randrange(count * 3)
        try:
            found = get(store, f"{value:064x}")
            if found is None:
                put(store, f"{value:064x}", [[torch.full((50,), value % 251, dtype=torch.uint8)]])
            elif not torch.equal(found[0][0], torch.full((50,), value % 251, dtype=torch.uint8)):
                errors.append(f"{number}: {value} at {turn}")
        except Exception as error:
            errors.append(repr(error))
    evicted.append(store.counts.evicted)
    if store.state or store.counts.refused:
        errors.append(f"{number}: {store.as_dict()}")


def members_together(tmp_path, members, each, most):
    """most: entries that the cap has room for."""
    errors, evicted, cap = [], [], most * ENTRY
    threads = [
        threading.Thread(target=take_part, args=(tmp_path, number, each, cap, errors, evicted))
        for number in range(members)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and sum(evicted) and len(entries(tmp_path)) > most // 2
    assert sum(path.stat().st_size for path in entries(tmp_path)) < cap * 1.3
    assert not list(tmp_path.glob(f"{FOLDER}/*/{PREFIX}*"))
    for path in entries(tmp_path):
        with open(path, "rb") as file:
            read_record(file, path.stem, member(tmp_path, key=KEY)._seal)


def test_members_that_write_read_and_evict_together(tmp_path):
    members_together(tmp_path, 4, 60, 60)


@pytest.mark.slow
def test_ten_members_and_ten_thousand_entries(tmp_path):
    members_together(tmp_path, 10, 4000, 10_000)
