"""Outputs on disk: what comes back is what was written, or nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kit.pack import ROOT
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
    assert not store(tier, "a", [image])


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


@pytest.mark.parametrize("half", [".safetensors", ".json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "emptied", "gone"])
def test_what_is_damaged_is_ignored_and_goes(tier, half, how):
    store(tier, "a", [image])
    path = tier.folder / f"a{half}"
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes({"flipped": data, "cut": data[:-7], "emptied": b"", "gone": b""}[how])
    if how == "gone":
        path.unlink()
    assert load(tier, "a") is None
    store(tier, "a", [image])
    assert same(load(tier, "a"), [image])


def test_a_tree_that_was_changed_is_ignored(tier):
    store(tier, "a", [[1]])
    path = tier.folder / "a.json"
    record = json.loads(path.read_text())
    record["tree"] = {"list": [{"literal": "other"}]}
    path.write_text(json.dumps(record))
    assert load(tier, "a") is None


def test_tensors_of_another_entry_are_ignored(tier):
    store(tier, "a", [image])
    store(tier, "b", [torch.ones(1)])
    (tier.folder / "b.safetensors").replace(tier.folder / "a.safetensors")
    assert load(tier, "a") is None


def test_the_cap_holds_and_the_least_recently_used_goes(tmp_path):
    import os

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

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spillway.cache.disk_tier.save_file", full)
    assert not store(tier, "a", [image])
    assert list(tier.folder.iterdir()) == [] and load(tier, "a") is None
    monkeypatch.setattr("spillway.cache.disk_tier.shutil.disk_usage", lambda _: type("Usage", (), {"free": 5})())
    assert not store(tier, "b", [image])


KEY = frozenset([(0, frozenset([(0, "KSampler"), (1, ("seed", 3)), (2, 1.5), (3, None), (4, True)])), (1, ("a", 1))])


def test_names_are_the_same_in_every_process_and_tell_keys_apart():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import kit.pack\n"
        "from spillway.cache.disk_tier import name_of\n"
        f"print(name_of({KEY!r}, {{'v': 1}}))"
    )
    found = {
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for _ in range(2)
    }
    assert found == {name_of(KEY, {"v": 1})}
    others = [name_of(KEY, {"v": 2}), name_of((1,), None), name_of((1.0,), None), name_of((True,), None)]
    assert len({*others, *found}) == 5


def test_keys_that_cannot_be_told_again_have_no_name():
    assert name_of((float("nan"),), None) is None
    assert name_of((object(),), None) is None
