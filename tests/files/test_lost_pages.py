"""A file that is cut short in the moment in which something reads it ends no process."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from kit.pack import ROOT
from spillway.ops.files import save_pipeline
from spillway.ops.files.deferred import Deferred, Stored
from spillway.ops.files.disk_map import DiskMap
from spillway.ops.files.lost_pages import KNOWN
from spillway.ops.files.watched_file import FileChanged

CUT = ROOT / "tests" / "kit" / "processes" / "cut_while_read.py"
HOW = ["in this thread", "in a thread", "many threads", "held by Python"]


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / name for name in ("cut.safetensors", "other.safetensors")]
    for path in paths:
        save_file({"weight": torch.ones(2048, 1024)}, path)
    return paths


def cut(files, how):
    command = [sys.executable, CUT, files[0], how, files[1]]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.skipif(not KNOWN, reason="where nobody can cut a mapped file, or the system's structures are not known")
@pytest.mark.parametrize("how", HOW)
def test_the_process_goes_on_and_the_file_is_an_error(how, files):
    done = cut(files, how)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}{done.stderr}"  # -7: SIGBUS
    said = json.loads(done.stdout)
    assert said["lost"] >= 1 and said["since"].startswith("SourceError ")
    assert "cut.safetensors: a part of this file could not be read while it was in use" in said["since"]
    assert "cut.safetensors: this file was cut to 4096 of" in said["check"]
    assert said["the other"] == ["None", 2048 * 1024] and said["nothing since"] == "None"


@pytest.mark.skipif(sys.platform != "linux", reason="the signal is Linux's")
@pytest.mark.parametrize("how", ["of others", "sent"])
def test_what_is_none_of_ours_ends_the_process_as_ever(how, files):
    assert cut(files, how).returncode == -7


def test_what_is_read_after_the_last_check_is_not_saved(files, tmp_path, monkeypatch):
    """The writing thread reads views of the map, behind who made them."""
    path = files[0]
    tensor = Deferred.of(Stored(DiskMap(path).tensor("weight")), (2048, 1024), torch.float32)
    drop = save_pipeline._Behind.drop

    def overwrite(behind, read):
        with open(path, "r+b") as file:
            file.seek(-100, 2)
            file.write(bytes(100))
        drop(behind, read)

    monkeypatch.setattr(save_pipeline._Behind, "drop", overwrite)
    with pytest.raises(FileChanged, match=r"cut\.safetensors: this file was written to"):
        save_pipeline.save(tmp_path / "saved.safetensors", {"x": tensor})
    assert sorted(one.name for one in tmp_path.iterdir()) == ["cut.safetensors", "other.safetensors"]
