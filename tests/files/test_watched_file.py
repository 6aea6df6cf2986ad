"""A file that changes under a model is an error that names it, not a mixed picture and not the end of the process."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from kit.nets import Stack, dynamic, same, write
from kit.pack import ROOT
from spillway.ops.files import disk_map as mapping
from spillway.ops.files import read_whole as reading
from spillway.ops.files.check_before_read import CheckBeforeRead
from spillway.ops.files.deferred import Deferred, Stored
from spillway.ops.files.disk_map import DiskMap, SourceError, check_files, locate
from spillway.ops.files.read_whole import read_whole
from spillway.ops.files.save_pipeline import save
from spillway.ops.files.watched_file import FileChanged

FILE_CHANGES = ROOT / "tests" / "kit" / "processes" / "file_changes.py"
posix = pytest.mark.skipif(os.name == "nt", reason="Windows lets nobody change a mapped file")


@pytest.fixture
def original(tmp_path):
    path = tmp_path / "model.safetensors"
    write(path, Stack())
    return path


def outcomes(original, device, what):
    """Run the models in a process of their own. Returns {"fraction when": what came of each attempt}."""
    done = subprocess.run(
        [sys.executable, FILE_CHANGES, original, device, what], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}{done.stderr}"  # -7: SIGBUS
    said = dict(json.loads(line) for line in done.stdout.splitlines())
    assert len(said) == 6
    return said


@posix
@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("what", ["cut", "overwritten", "overwritten, its time set back"])
def test_a_file_that_changes_in_place_is_an_error(what, device, original):
    words = "cut to 4096 of" if what == "cut" else "written to while it was in use"
    for case, said in outcomes(original, device, what).items():
        # On a device all of a step may have been read before the file changed in the middle of it.
        was_read = device == "sim" and case.endswith("middle") and said["run"] == "same"
        for attempt in ("run again", "save") if was_read else ("run", "run again", "save"):
            assert said[attempt].startswith("FileChanged"), (case, said)
            assert f"model.safetensors: this file was {words}" in said[attempt], (case, said)
        assert said["left"] == [], case


@posix
@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("what", ["replaced", "removed"])
def test_a_file_that_another_one_replaces_stays_in_use(what, device, original):
    """The weights are those of the file that was opened."""
    for case, said in outcomes(original, device, what).items():
        assert said == {"run": "same", "run again": "same", "save": "done", "left": ["model.saved"]}, case


@posix
def test_resident_weights_that_lie_in_their_file_are_checked_within_a_step(original):
    model = dynamic(Stack, original)
    x = model.module.input()
    wanted = model(x)
    assert same(model(x), wanted)  # all resident where they lie

    def overwrite(*_):
        with open(original, "r+b") as file:
            file.seek(-1 << 18, os.SEEK_END)
            file.write(bytes(1 << 18))
        time.sleep(0.005)

    model.module.layers[3].register_forward_hook(overwrite)
    with pytest.raises(FileChanged, match=r"model\.safetensors: this file was written to"):
        model(x)


def test_a_check_takes_a_microsecond_or_a_few(original):
    disk_map = DiskMap(original)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        for _ in range(100):
            disk_map.check()
        times.append((time.perf_counter() - start) / 100)
    assert min(times) < 5e-6


def overwrite(path, set_back=False):
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(100))
    if set_back:
        time.sleep(0.02)  # a file system's clock is coarse
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def set_attribute(path):
    if not hasattr(os, "setxattr"):
        pytest.skip("this system has no attributes that Python can set")
    try:
        os.setxattr(path, "user.spillway", b"seen")
    except OSError as error:
        pytest.skip(f"this file system has no attributes ({error})")


HARMLESS = {
    "another name": lambda path: path.rename(path.with_name("moved")),
    "a second name": lambda path: os.link(path, path.with_name("linked")),
    "other rights": lambda path: path.chmod(0o600 if path.stat().st_mode & 0o77 else 0o644),
    "an attribute": set_attribute,
    "nothing": lambda path: None,
}


@posix
@pytest.mark.parametrize("what", HARMLESS)
def test_what_leaves_the_numbers_is_no_change_and_hides_none(what, original, tmp_path):
    """All of it sets the time of the last change of any kind, as does whoever sets a file's time back."""
    disk_map = DiskMap(original)
    time.sleep(0.02)
    HARMLESS[what](original)
    for _ in range(3):
        disk_map.check()
    (path,) = [one for one in tmp_path.iterdir() if one.name != "linked"]
    time.sleep(0.02)
    overwrite(path, set_back=True)
    for _ in range(3):
        with pytest.raises(FileChanged, match=r"model\.safetensors: this file was written to"):
            disk_map.check()


@posix
def test_a_backup_that_sets_the_time_of_reading_back_is_no_change(original):
    disk_map, status = DiskMap(original), original.stat()
    time.sleep(0.02)
    os.utime(original, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert original.stat().st_ctime_ns != status.st_ctime_ns
    disk_map.check()


@posix
def test_threads_that_ask_at_once_agree_on_what_is_no_change(original):
    disk_map, errors = DiskMap(original), []

    def ask():
        try:
            for _ in range(300):
                disk_map.check()
        except FileChanged as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for number in range(40):
        original.chmod((0o600, 0o644)[number % 2])
        time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert not errors


@posix
def test_a_file_that_changes_while_it_is_opened_is_an_error(original, monkeypatch):
    parse = mapping.parse_header
    monkeypatch.setattr(mapping, "parse_header", lambda *given: (parse(*given), overwrite(original))[0])
    with pytest.raises(FileChanged, match=r"model\.safetensors: this file was written to"):
        DiskMap(original)


@posix
def test_a_tensor_that_outlives_its_map_is_checked(original):
    """As in a merge by another pack, which keeps the tensors of a model alone."""
    tensor = DiskMap(original).tensor("layers.0.weight")
    assert locate(tensor) is None, "the map is still known"
    check_files([tensor])
    overwrite(original)
    with pytest.raises(FileChanged, match=r"model\.safetensors: this file was written to"):
        check_files([tensor])


@posix
def test_a_tensor_is_checked_for_each_part_that_is_saved(tmp_path):
    path, shape = tmp_path / "model.safetensors", (4096, 1024)
    save_file({"x": torch.zeros(shape)}, path)
    tensor = Deferred.of(Stored(DiskMap(path).tensor("x")), shape, torch.float32)
    changes = [lambda: overwrite(path)]
    with pytest.raises(FileChanged, match=r"model\.safetensors: this file was written to"):
        save(tmp_path / "saved", {"x": tensor}, progress=lambda done, _: done and changes and changes.pop()())
    assert changes == [] and os.listdir(tmp_path) == ["model.safetensors"]


@posix
def test_others_code_is_checked_before_it_reads(original):
    disk_map = DiskMap(original)
    tensor = disk_map.tensor("layers.0.weight")
    with CheckBeforeRead([disk_map]):
        assert tensor.sum().isfinite()
        overwrite(original)
        time.sleep(0.005)
        for read in (torch.Tensor.tolist, torch.Tensor.clone, lambda one: one + 1):
            with pytest.raises(FileChanged, match=r"model\.safetensors: this file was written to"):
                read(tensor)


# In memory


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 100), lambda path: path.write_bytes(bytes(4096))])
def test_what_is_read_whole_is_out_of_the_files_reach(change, tmp_path):
    path = tmp_path / "lora.safetensors"
    values = {"a": torch.arange(3000.0).view(30, 100), "none": torch.zeros(0, 3), "b": torch.tensor([True, False])}
    save_file(values, path, {"by": "us"})
    tensors, metadata = read_whole(path)
    assert all(locate(tensor) is None for tensor in tensors.values())
    change(path)
    assert metadata == {"by": "us"} and set(tensors) == set(values)
    assert all(torch.equal(tensors[key], value) and tensors[key].dtype == value.dtype for key, value in values.items())


def test_a_file_that_does_not_fit_into_memory_is_mapped(tmp_path, monkeypatch):
    path = tmp_path / "lora.safetensors"
    save_file({"a": torch.arange(3000.0)}, path)
    monkeypatch.setattr(reading, "SHARE", 1 << 40)
    tensors, _ = read_whole(path)
    disk_map, _, _ = locate(tensors["a"])
    assert torch.equal(tensors["a"], torch.arange(3000.0))
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(bytes(4))
    with pytest.raises(FileChanged, match=r"lora\.safetensors: this file was written to"):
        disk_map.check()


def test_a_file_that_is_written_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "lora.safetensors"
    save_file({"a": torch.arange(3000.0)}, path)
    parse = reading.parse_header

    def parse_and_write(*arguments):
        header = parse(*arguments)
        path.write_bytes(path.read_bytes()[:-4])
        return header

    monkeypatch.setattr(reading, "parse_header", parse_and_write)
    with pytest.raises(FileChanged, match="cut to"):
        read_whole(path)


@pytest.mark.parametrize("content", [b"", b"no file", bytes(200)])
def test_reading_whole_refuses_what_a_map_refuses(content, tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"lora\.safetensors"):
        read_whole(path)
