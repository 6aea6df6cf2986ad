"""A file that lies elsewhere is probed by its header alone."""

import subprocess
import sys

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from kit.gguf_files import write_gguf
from kit.nets import Stack, write
from kit.pack import ROOT
from kit.range_server import serving
from spillway.ops.files.coming_file import is_any_coming
from spillway.ops.files.safetensors_header import SourceError
from spillway.ops.parts.probe import probe
from spillway.ops.remote import probe as probing
from spillway.ops.remote.probe import probe_address


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "model.safetensors", Stack(40))
    write_gguf(tmp_path / "model.gguf", {"blk.0.ffn_up.weight": torch.randn(1024, 1024)})
    (tmp_path / "model.ckpt").write_bytes(b"x" * 100)
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-5])
    with serving(tmp_path) as server:
        yield server


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_a_probe_says_what_it_says_of_a_local_file_and_brings_the_header(name, files):
    path = files.folder / name
    found, wanted = probe_address(files.address(name)), probe(path)
    assert found.words == wanted.words and found.path == files.address(name)
    assert files.sent < path.stat().st_size / 2
    assert not is_any_coming()
    fsspec.filesystem("memory").pipe(f"/models/{name}", path.read_bytes())
    assert probe_address(f"memory://models/{name}").words == wanted.words
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize(
    ("name", "words"),
    [("model.ckpt", "pickles, which may run code"), ("short.safetensors", "truncated"), ("none.gguf", "answered 404")],
)
def test_an_error_names_the_address(name, words, files):
    with pytest.raises(SourceError, match=words) as raised:
        probe_address(files.address(name))
    assert str(raised.value).startswith(files.address(name))
    assert not is_any_coming()


def test_a_server_that_is_busy_is_named_after_a_few_tries(files, monkeypatch):
    monkeypatch.setattr(probing, "PAUSES", (0.01, 0.01))
    files.fault = "busy"
    with pytest.raises(SourceError, match=r"model\.gguf: the server answered 503 .* Check the address and the network"):
        probe_address(files.address("model.gguf"))


def test_the_command_takes_an_address(files):
    command = [sys.executable, ROOT / "dev.py", "probe", files.address("model.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == probe(files.folder / "model.safetensors").words + "\n"
