"""Evicted outputs on disk, in ComfyUI's executor."""

import folder_paths
import torch

from kit.comfyui.executor import ALL, Executor, prompt
from spillway.cache import disk_format


def written(user):
    kinds = []
    for path in (user / "__spillway" / "outputs").glob("*.output"):
        with open(path, "rb") as file:
            kinds.append(disk_format.read_record(file, path.stem).kind)
    return sorted(kinds)


def evict(executor):
    executor.cache.engine.evict(1 << 60)
    assert executor.cache.engine.writer.wait(60)


def test_evicted_outputs_are_found_after_a_restart(installed, user):
    first = Executor()
    first.run(prompt())
    assert written(user) == []
    evict(first)
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
    evict(first)
    for path in (user / "__spillway" / "outputs").glob("*.output"):
        data = bytearray(path.read_bytes())
        data[20] ^= 1
        path.write_bytes(data)
    assert sorted(Executor().run(prompt())) == sorted(ALL)


def test_the_disk_is_off_by_default(executor, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    executor.run(prompt())
    executor.cache.engine.evict(1 << 60)
    assert executor.cache.disk is None and list(tmp_path.iterdir()) == []
