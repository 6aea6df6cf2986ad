"""Several processes save and sweep in the same folders: nothing is lost, nothing is left, nothing is replaced."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from kit.pack import ROOT
from spillway.ops.files import partial_file
from spillway.ops.files.deferred import Deferred, Stored
from spillway.ops.files.partial_file import PartialFile, sweep, sweep_noted
from spillway.ops.files.save_pipeline import save

SAVE_FILES = ROOT / "tests" / "kit" / "processes" / "save_files.py"
posix = pytest.mark.skipif(os.name == "nt", reason="an open file cannot be removed there")


def tensors():
    return {"a": Deferred.of(Stored(torch.arange(4.0)), (4,), torch.float32)}


def test_two_processes_save_under_one_prefix_while_a_third_sweeps(tmp_path):
    command = [sys.executable, str(SAVE_FILES), "counted", str(tmp_path)]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        print("go", file=writer.stdin, flush=True)
    while any(writer.poll() is None for writer in writers):
        sweep_noted(tmp_path / "journal"), sweep(tmp_path)
    said = [json.loads(writer.communicate()[0]) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    made = {path: one["pid"] for one in said for path in one["paths"]}
    assert sorted(made) == [f"model_{number:05}_.safetensors" for number in range(1, 31)]
    for path, pid in made.items():
        assert bool((load_file(tmp_path / path)["x"] == pid).all()), path
    assert set(os.listdir(tmp_path)) == {*made, "journal"} and not os.listdir(tmp_path / "journal")


@pytest.mark.parametrize(
    ("name", "taken", "wanted"),
    [
        ("model_00001_.safetensors", ["model_00001_.safetensors"], "model_00002_.safetensors"),
        ("m_00009_.safetensors", [f"m_{n:05}_.safetensors" for n in (9, 10, 11, 13)], "m_00012_.safetensors"),
        ("7_99999_.safetensors", ["7_99999_.safetensors"], "7_100000_.safetensors"),
        ("model1.safetensors", ["model1.safetensors"], "model2.safetensors"),
    ],
)
def test_a_name_that_is_taken_meanwhile_is_counted_up(tmp_path, name, taken, wanted):
    def appear(*_):
        for other in taken:
            (tmp_path / other).write_bytes(b"somebody else's")

    written = save(tmp_path / name, tensors(), progress=appear, counted=True)
    assert written.path == tmp_path / wanted and written.nbytes == written.path.stat().st_size
    assert all((tmp_path / other).read_bytes() == b"somebody else's" for other in taken)
    assert set(os.listdir(tmp_path)) == {*taken, wanted}


def test_a_name_without_a_number_is_never_replaced(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"somebody else's")
    with pytest.raises(FileExistsError, match=r"model\.safetensors exists already"):
        save(tmp_path / "model.safetensors", tensors(), counted=True)
    assert (tmp_path / "model.safetensors").read_bytes() == b"somebody else's"


@pytest.mark.skipif(sys.platform != "linux", reason="the call that never replaces a file is Linux's")
def test_nothing_is_replaced_where_there_are_no_hard_links(tmp_path, monkeypatch):
    """As on exFAT. The other file appears after the last look, which here sees nothing at all."""

    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    def hide(*_):
        monkeypatch.setattr(partial_file.os.path, "lexists", lambda path: False)

    monkeypatch.setattr(partial_file.os, "link", refuse)
    (tmp_path / "m_00001_.safetensors").write_bytes(b"somebody else's")
    written = save(tmp_path / "m_00001_.safetensors", tensors(), progress=hide, counted=True)
    monkeypatch.undo()
    assert written.path.name == "m_00002_.safetensors" and "a" in load_file(written.path)
    assert (tmp_path / "m_00001_.safetensors").read_bytes() == b"somebody else's"


class Sweeps:
    """Calls through to functions of the writer, and sweeps as another server would before or after one call of all."""

    def __init__(self, monkeypatch, folder, at):
        self.folder, self.at, self.calls, self.inside = folder, at, 0, False
        for place, name in ((partial_file, "open"), (partial_file.fcntl, "flock")):
            monkeypatch.setattr(place, name, self.around(getattr(place, name, open)), raising=False)

    def around(self, function):
        def call(*args, **kwargs):
            self.look()
            result = function(*args, **kwargs)
            self.look()
            return result

        return call

    def look(self):
        if not self.inside:
            self.calls += 1
            if self.calls == self.at:
                self.inside = True
                self.removed = sweep_noted(self.folder / "journal") + sweep(self.folder)
                self.inside = False


@posix
@pytest.mark.parametrize("at", range(1, 9))
def test_a_sweep_at_any_moment_of_the_beginning(tmp_path, monkeypatch, at):
    """The file is locked before it counts as made, and so is its note, from which the next start removes the file."""
    with monkeypatch.context() as patch:
        sweeps = Sweeps(patch, tmp_path, at)
        made = PartialFile(tmp_path / "a", journal=tmp_path / "journal")
    assert sweeps.calls >= 8
    (note,) = (tmp_path / "journal").iterdir()
    assert note.read_bytes() == os.fsencode(made.path) and made.path.exists()
    assert sweep_noted(tmp_path / "journal") == sweep(tmp_path) == [], "its writer lives"
    path = made.path
    if at % 2:
        made.file.write(b"whole")
        made.commit()
        assert (tmp_path / "a").read_bytes() == b"whole" and sorted(os.listdir(tmp_path)) == ["a", "journal"]
    else:
        del made  # as when its process dies
        assert sweep_noted(tmp_path / "journal") == [path] and os.listdir(tmp_path) == ["journal"]
    assert not os.listdir(tmp_path / "journal")


@posix
def test_a_sweep_that_is_half_done(tmp_path, monkeypatch):
    """It holds the lock of the new file, which it will remove in a moment: the writer takes another one."""
    lock, taken = partial_file.fcntl.flock, []

    def lock_after_the_sweep(handle, kind):
        if not taken:
            (path,) = tmp_path.iterdir()
            taken.extend([os.open(path, os.O_RDONLY), path])
            lock(taken[0], kind)
        return lock(handle, kind)

    monkeypatch.setattr(partial_file.fcntl, "flock", lock_after_the_sweep)
    made = PartialFile(tmp_path / "a")
    taken[1].unlink()  # and so the sweep ends
    os.close(taken[0])
    made.file.write(b"whole")
    made.commit()
    assert (tmp_path / "a").read_bytes() == b"whole" and os.listdir(tmp_path) == ["a"]
