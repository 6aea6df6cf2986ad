"""Evicted outputs on disk, in ComfyUI's executor."""

import json

import folder_paths
import pytest
import torch

from kit.comfyui.executor import ALL, Executor, prompt


@pytest.fixture
def user(monkeypatch, tmp_path):
    """A user folder with the disk tier on, and nodes that take long enough for it."""
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    settings = tmp_path / "default" / "comfy.settings.json"
    settings.parent.mkdir()
    settings.write_text(json.dumps({"Spillway.Cache.DiskGB": 1, "Spillway.Cache.DiskSeconds": 0}))
    return tmp_path


def written(user):
    return sorted(json.loads(path.read_text())["kind"] for path in (user / "__spillway" / "outputs").glob("*.json"))


def test_evicted_outputs_are_found_after_a_restart(installed, user):
    first = Executor()
    first.run(prompt())
    assert written(user) == []
    first.cache.engine.evict(1 << 60)
    assert written(user) == ["Decode", "Encode", "Sample"], "no models, and nothing that was shown"
    assert first.run(prompt()) == ["Save"]

    later = Executor()
    assert later.run(prompt()) == ["Save"]
    assert later.kinds() == ["Decode", "Save"], "nothing is read that nothing needs"
    wanted, found = (executor.cache.engine for executor in (first, later))
    (a,), (b,) = (
        [e.values[k].outputs[0][0] for k in e.values if e.entries[k].kind == "Decode"] for e in (wanted, found)
    )
    assert torch.equal(a, b)
    assert later.run(prompt(seed=2)) == ["Load", "Lora", "Sample", "Decode", "Save"], "its text was there"


def test_what_is_damaged_is_made_again(installed, user):
    first = Executor()
    first.run(prompt())
    first.cache.engine.evict(1 << 60)
    for path in (user / "__spillway" / "outputs").glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert sorted(Executor().run(prompt())) == sorted(ALL)


def test_a_model_file_that_changed_gives_another_name(installed, user, models_dir):
    from spillway.cache.comfyui import disk as comfy_disk

    path = models_dir / "checkpoints" / "changing.safetensors"
    path.write_bytes(b"one")
    key = frozenset([(0, "Load"), (1, ("name", "changing.safetensors"))])
    before = comfy_disk.file_name(key)
    assert before == comfy_disk.file_name(key)
    path.write_bytes(b"other")
    assert comfy_disk.file_name(key) != before
    path.unlink()


def test_the_disk_is_off_by_default(executor, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    executor.run(prompt())
    executor.cache.engine.evict(1 << 60)
    assert executor.cache.disk is None and list(tmp_path.iterdir()) == []
