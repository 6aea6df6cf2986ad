"""Outputs on disk: what comes back is what was written, or nothing."""

import hashlib
import json
import os
import random
import sys

import pytest
import torch

from kit.own_process import in_own_process
from spillway.cache import disk_format
from spillway.cache.disk_tier import DiskTier, name_of
from spillway.ops.ledger import Ledger

MIB = 1 << 20


@pytest.fixture
def tier(tmp_path):
    return DiskTier(tmp_path / "outputs", 100 * MIB, 1.0, Ledger("test"))


def store(tier, name, outputs):
    return tier.store(name, outputs, seconds=20.0, kind="Node")


def load(tier, name):
    found = tier.load(name)
    assert found is None or found[1:] == (20.0, None)
    return found and found[0]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


image = torch.rand(1, 8, 8, 3)
OUTPUTS = {
    "image": [[image]],
    "latent": [[{"samples": torch.randn(1, 4, 8, 8, dtype=torch.bfloat16), "downscale": 8, "name": "x"}]],
    "conditioning": [
        [[[torch.randn(1, 77, 16), {"pooled_output": torch.randn(1, 16), "strength": 0.5, "area": (1, 2)}]]]
    ],
    "views": [[image[:, ::2].transpose(1, 2), image[0], image]],
    "literals": [[None, True, 1, 1.5, "text", (), {}]],
    "empty": [[torch.empty(0, 3)]],
    "none": [],
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_what_comes_back_is_what_was_written(tier, kind):
    assert store(tier, "a", OUTPUTS[kind])
    assert same(load(tier, "a"), OUTPUTS[kind])
    assert same(load(DiskTier(tier.folder, 0, 0, Ledger("later")), "a"), OUTPUTS[kind])


def test_the_same_tensor_twice_is_one(tier):
    store(tier, "a", [image, {"again": image}])
    first, rest = load(tier, "a")
    assert first is rest["again"] or first.data_ptr() == rest["again"].data_ptr()


@pytest.mark.parametrize(
    "value", [object(), {1: 2}, {3}, torch.nn.Linear(1, 1), torch.nn.Parameter(torch.ones(1)), b"x"]
)
def test_what_is_not_plain_is_not_written(tier, value):
    assert not store(tier, "a", [[value]])
    assert load(tier, "a") is None and not tier.folder.exists()


def test_what_was_cheap_or_has_no_room_is_not_written(tier):
    assert not tier.store("a", [image], seconds=0.5, kind="Node")
    tier.room = lambda: 100
    assert not store(tier, "a", [image.transpose(1, 2)]), "it would have to be copied"


def test_cycles_are_not_written(tier):
    loop = []
    loop.append(loop)
    assert not store(tier, "a", loop)


def test_what_no_longer_holds_goes(tier):
    """Stamps are the caller's: they come back as they were, and another one's entry is written over."""
    for stamps in ([["file", "a", [1]]], [["file", "a", [2]]]):
        assert tier.store("a", [stamps], seconds=20.0, kind="Node", stamps=stamps)
        assert tier.load("a", lambda found, stamps=stamps: found == stamps) == ([stamps], 20.0, stamps)
    assert tier.load("a", lambda found: False) is None
    assert list(tier.folder.iterdir()) == []
    assert "what Node was made from has changed" in tier.ledger.decisions[-1]


DAMAGE = ["flipped", "cut", "emptied", "grown", "a folder", *(["a pipe", "a link"] if sys.platform != "win32" else [])]


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("where", [0, 0.1, 0.5, 0.999])
def test_what_is_damaged_is_ignored_and_goes(tier, how, where):
    store(tier, "a", [image])
    path = tier.path("a")
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[int(len(data) * where)] ^= 1
    path.write_bytes({"flipped": data, "cut": data[: int(len(data) * where)], "grown": data + b"x"}.get(how, b""))
    if how in ("a pipe", "a link", "a folder"):
        path.unlink()
        if how == "a pipe":
            os.mkfifo(path)
        elif how == "a link":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
    assert load(tier, "a") is None
    assert len(tier.ledger.decisions) == 2 and "is damaged" in tier.ledger.decisions[-1]
    if how == "a folder":
        path.rmdir()
    assert not os.path.lexists(path)
    store(tier, "a", [image])
    assert same(load(tier, "a"), [image])


def test_entries_that_changed_places_are_ignored(tier):
    store(tier, "a", [image])
    store(tier, "b", [torch.ones(1)])
    a, b, between = tier.path("a"), tier.path("b"), tier.folder / "between"
    a.rename(between), b.rename(a), between.rename(b)
    assert load(tier, "a") is load(tier, "b") is None
    assert "another name" in tier.ledger.decisions[-1]


# --- forged entries: everybody can compute a hash ---------------------------------------------------------------------


def forge(tier, change):
    """Write entry a, with its record changed and all hashes right."""
    store(tier, "a", [[image, {"b": torch.arange(6)}]])
    raw = tier.path("a").read_bytes()
    length, _ = disk_format.TRAILER.unpack(raw[-disk_format.TRAILER.size :])
    end = len(raw) - disk_format.TRAILER.size - length
    record = json.loads(raw[end : end + length])
    text = change(record)
    text = text if isinstance(text, bytes) else json.dumps(record).encode()
    trailer = disk_format.TRAILER.pack(len(text), hashlib.blake2b(text, digest_size=32).digest())
    tier.path("a").write_bytes(raw[:end] + text + trailer)


def deep(levels, inner="1"):
    return '{"list": [' * levels + f'{{"literal": {inner}}}' + "]}" * levels


def with_tree(tree):
    return lambda record: record.update(tree=tree)


def with_text(old, new):
    return lambda record: json.dumps(record).replace(old, new).encode()


FORGED = {
    "deep": lambda record: json.dumps(record | {"tree": 0}).replace('"tree": 0', f'"tree": {deep(500)}').encode(),
    "too deep to parse": lambda record: deep(200_000).encode(),
    "no object": lambda record: b"[]",
    "no JSON": lambda record: b"{",
    "no text": lambda record: b"\xff\xfe",
    "a large number": with_text('"seconds": 20.0', f'"seconds": {"9" * 5000}'),
    "no seconds": lambda record: record.update(seconds="long"),
    "seconds that are none": lambda record: record.update(seconds=float("nan")),
    "unknown kind": with_tree({"set": []}),
    "two kinds": with_tree({"list": [], "tuple": []}),
    "a bare value": with_tree(None),
    "a list of pairs that are none": with_tree({"dict": [["a"]]}),
    "a key that is no text": with_tree({"dict": [[1, {"literal": 1}]]}),
    "a literal that is none": with_tree({"literal": []}),
    "no such tensor": with_tree({"tensor": 2, "device": "cpu"}),
    "a tensor before the first": with_tree({"tensor": -1, "device": "cpu"}),
    "a tensor by truth": with_tree({"tensor": True, "device": "cpu"}),
    "no such device": with_tree({"tensor": 0, "device": "elsewhere"}),
    "no memory": with_tree({"tensor": 0, "device": "meta"}),
    "an absent device": with_tree({"tensor": 0, "device": "cuda:99"}),
    "many items": with_tree({"list": [{"literal": 0}] * 30_000}),
    "a huge shape": lambda record: record["tensors"].__setitem__(0, ["float32", [1 << 40]]),
    "a shape beyond numbers": lambda record: record["tensors"].__setitem__(0, ["float32", [1 << 62, 1 << 62]]),
    "a huge shape without bytes": lambda record: record["tensors"].append(["float32", [0, 1 << 62, 1 << 62]]),
    "a negative shape": lambda record: record["tensors"].__setitem__(0, ["float32", [-1]]),
    "a shape of many dimensions": lambda record: record["tensors"].append(["float32", [0] * 10_000]),
    "a shape that is none": lambda record: record["tensors"].append(["float32", {}]),
    "an unknown dtype": lambda record: record["tensors"].__setitem__(0, ["nn", [1]]),
    "no dtype": lambda record: record["tensors"].__setitem__(0, [[], [1]]),
    "many tensors": lambda record: record["tensors"].extend([["float32", [0]]] * 30_000),
    "no tensors": lambda record: record.pop("tensors"),
    "no name": lambda record: record.pop("name"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_entry_is_a_miss(tier, kind):
    forge(tier, FORGED[kind])
    assert load(tier, "a") is None
    assert len(tier.ledger.decisions) == 2 and "is damaged" in tier.ledger.decisions[-1]


def test_what_is_forged_alike_is_found(tier):
    """Else the tests of forged entries show nothing."""
    forge(tier, lambda record: None)
    assert load(tier, "a")


def mutate(rng, value):
    """Change one thing somewhere in JSON data."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value[key] = mutate(rng, value[key])
        if rng.random() < 0.1:
            del value[key]
        return value
    anything = [None, True, -1, 0, 3, 1e308, float("inf"), 1 << 70, "", "cpu", "meta", "bool", "\ud800", [], {}, [[]]]
    return rng.choice([*anything, {"list": [value]}, {"tensor": 1, "device": "cpu"}, [value] * 3])


def test_three_thousand_mutated_entries(tier):
    """Whatever lies there, nothing is raised, and what is given is an output."""
    rng = random.Random(5)
    tier.ledger.decide = lambda *_, **__: None
    store(tier, "a", [[image, {"b": torch.arange(6)}, (1, None, "x")]])
    raw = tier.path("a").read_bytes()
    length, _ = disk_format.TRAILER.unpack(raw[-disk_format.TRAILER.size :])
    end = len(raw) - disk_format.TRAILER.size - length
    found = 0
    for number in range(3000):
        data = bytearray(raw)
        if number % 3:  # with right hashes
            record = json.loads(raw[end : end + length])
            for _ in range(rng.randint(1, 3)):
                record = mutate(rng, record)
            text = json.dumps(record).encode()
            data[end:] = text + disk_format.TRAILER.pack(len(text), hashlib.blake2b(text, digest_size=32).digest())
        else:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            del data[rng.randrange(len(data)) if rng.random() < 0.3 else len(data) :]
        tier.path("a").write_bytes(data)
        loaded = tier.load("a")
        found += loaded is not None
        assert loaded is None or (loaded[1] >= 0 and disk_format.is_storable(loaded[0]))
        assert (loaded is not None) == tier.path("a").exists(), "what is not believed goes"
    assert 0 < found < 1500


def test_an_output_that_holds_one_list_again_and_again_is_not_written(tier):
    """At each of thirty levels twice: a thousand million items."""
    value = []
    for _ in range(30):
        value = [value, value]
    assert not store(tier, "a", value)


def test_an_entry_that_has_no_room_in_ram_stays(tier):
    store(tier, "a", [image])
    tier.room = lambda: 100
    assert load(tier, "a") is None
    tier.room = lambda: 1 << 40
    assert same(load(tier, "a"), [image])


def test_the_cap_holds_and_the_least_recently_used_goes(tmp_path):
    tier = DiskTier(tmp_path, 10 * MIB, 1.0, Ledger("test"))
    for number in range(3):
        store(tier, str(number), [torch.zeros(4 * MIB, dtype=torch.uint8)])
        for path in tmp_path.glob(f"{number}.*"):
            os.utime(path, (1000 + number, 1000 + number))
        if number == 1:
            assert load(tier, "0") is not None  # used: now the newest
    assert load(tier, "1") is None and load(tier, "0") is not None and load(tier, "2") is not None
    assert not store(tier, "large", [torch.zeros(11 * MIB, dtype=torch.uint8)])
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10 * MIB


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    tier = DiskTier(tmp_path / "file" / "outputs", 100 * MIB, 1.0, Ledger("test"))
    assert not any(store(tier, str(number), [image]) for number in range(6))
    assert load(tier, "0") is None
    assert caplog.text.count("cannot be written") == 1


def test_a_full_disk_leaves_nothing_half(tier, monkeypatch):
    """A disk that is really full does not exist here: the write fails as it would."""

    def full(file, *_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spillway.cache.disk_tier.write", full)
    assert not store(tier, "a", [image])
    assert list(tier.folder.iterdir()) == [] and load(tier, "a") is None
    monkeypatch.setattr("spillway.cache.disk_tier.shutil.disk_usage", lambda _: type("Usage", (), {"free": 5})())
    assert not store(tier, "b", [image])


KEY = frozenset([(0, frozenset([(0, "KSampler"), (1, ("seed", 3)), (2, 1.5), (3, None), (4, True)])), (1, ("a", 1))])


def test_names_are_the_same_in_every_process_and_tell_keys_apart():
    code = f"import kit.pack\nfrom spillway.cache.disk_tier import name_of\nprint(name_of({KEY!r}, {{'v': 1}}))"
    found = {in_own_process(code) for _ in range(2)}
    assert found == {name_of(KEY, {"v": 1})}
    others = [name_of(KEY, {"v": 2}), name_of((1,), None), name_of((1.0,), None), name_of((True,), None)]
    assert len({*others, *found}) == 5


def test_keys_that_cannot_be_told_again_have_no_name():
    assert name_of((float("nan"),), None) is None
    assert name_of((object(),), None) is None
