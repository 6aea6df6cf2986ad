"""A table of many files: what each is, which are there twice, which do not load. No tensor is read as a whole."""

import os

import pytest
import torch
from safetensors.torch import save_file

from kit.gguf_files import write_gguf
from kit.pickles import MARK, malicious
from kit.shards import write_shards
from spillway.ops import scan as module
from spillway.ops.scan import as_text, is_model_file, scan

FLUX = ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight")


def flux(seed, rows=600):
    torch.manual_seed(seed)
    return {key: torch.randn(rows, 100).to(torch.bfloat16) for key in FLUX}


def found_in(folder):
    """{name: what is known of it} of all model files below a folder."""
    files = sorted(
        (os.path.relpath(os.path.join(path, name), folder).replace(os.sep, "/"), module.Path(path, name))
        for path, _, names in os.walk(folder)
        for name in names
        if is_model_file(name)
    )
    return {one.name: one for one in scan(files)}


def test_what_is_in_a_folder(tmp_path):
    save_file(flux(1), tmp_path / "a.safetensors")
    save_file(flux(1), tmp_path / "copy.safetensors")
    tuned = {**flux(1), FLUX[1]: flux(2)[FLUX[1]]}  # of the same names, shapes and size, and the same at its beginning
    save_file(tuned, tmp_path / "tuned.safetensors")
    write_gguf(tmp_path / "q.gguf", {key: value.float() for key, value in flux(1).items()})
    torch.save({"state_dict": flux(3)}, tmp_path / "old.ckpt")
    write_shards(tmp_path / "parts", flux(1), count=2)
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-5])
    save_file(flux(1), tmp_path / "lost-00002-of-00003.safetensors")
    (tmp_path / "notes.txt").write_text("no model")
    found = found_in(tmp_path)
    assert len(found) == 9
    assert found["copy.safetensors"].twin == "a.safetensors"
    assert {name for name, one in found.items() if one.twin} == {"copy.safetensors", "lost-00002-of-00003.safetensors"}
    broken = {"empty.safetensors", "cut.safetensors", "lost-00002-of-00003.safetensors"}
    assert {name for name, one in found.items() if not one.loads} == broken
    for name in ("a.safetensors", "tuned.safetensors", "old.ckpt", "parts/model.safetensors.index.json"):
        assert found[name].cells[1:3] == ("diffusion model, Flux", "BF16"), name
    assert found["q.gguf"].cells[1:3] == ("diffusion model, Flux", "F32")
    assert found["parts/model.safetensors.index.json"].note == "in 2 files"
    assert found["old.ckpt"].note == "a pickle: convert it to safetensors"
    assert found["cut.safetensors"].note.startswith("does not load: truncated: tensor")
    assert found["lost-00002-of-00003.safetensors"].note.startswith("this is part 2 of 3 of 'lost'")
    lines = as_text(list(found.values())).splitlines()
    assert lines[0].startswith("9 models, ") and "2 there twice" in lines[0] and "3 that do not load" in lines[0]
    assert lines[2].split("|")[0].strip() == "File" and len(lines) == 12
    assert {line.split("|")[0].strip() for line in lines[3:7]} == broken | {"copy.safetensors"}
    assert len({line.index("|") for line in lines[2:]}) == 1


def test_nothing_is_run_and_a_pickle_that_would_is_named(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    for name, (data, _) in malicious(tmp_path).items():
        (files / f"{name.replace(' ', '_')}.pt").write_bytes(data)
    found = found_in(files)
    assert not (tmp_path / MARK).exists()
    assert not any(one.loads for one in found.values()) and "system" in found["os.system.pt"].note


def test_a_large_file_is_sampled(tmp_path, monkeypatch):
    """Of 60 MB a few samples are read, and a difference that no sample sees makes no other file of it."""
    save_file({FLUX[0]: torch.zeros(30_000, 500), FLUX[1]: torch.ones(2)}, tmp_path / "a.safetensors")
    read = []

    class Counted:
        def __init__(self, *arguments, **options):
            self.file = open(*arguments, **options)  # noqa: SIM115 - closed by __exit__

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, place):
            self.file.seek(place)

        def read(self, count):
            read.append(count)
            return self.file.read(count)

    monkeypatch.setattr(module, "open", Counted, raising=False)
    assert found_in(tmp_path)["a.safetensors"].loads
    assert 0 < sum(read) <= 128 << 10


def test_the_progress_and_an_interrupt(tmp_path):
    for number in range(3):
        save_file(flux(number, rows=2), tmp_path / f"{number}.safetensors")
    files = [(path.name, path) for path in sorted(tmp_path.iterdir())]
    seen = []
    scan(files, lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]

    def interrupt(done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(files, interrupt)


def test_a_file_that_goes_meanwhile_and_no_files(tmp_path):
    (one,) = scan([("gone.safetensors", tmp_path / "gone.safetensors")])
    assert not one.loads and "No such file" in one.note
    assert as_text([]).startswith("0 models")


@pytest.mark.skipif(os.name == "nt", reason="names that Windows does not take")
def test_odd_names_and_things_that_are_no_files(tmp_path):
    """A row is a line, whatever a file is called. What is no file is not waited for."""
    names = (
        b"a\n| b | c.safetensors",
        b"tab\t.safetensors",
        b"\xff\xfe.safetensors",
        "\u202ereversed.safetensors".encode(),
    )
    for name in names:
        save_file(flux(1), tmp_path / "x")
        os.rename(tmp_path / "x", os.path.join(os.fsencode(tmp_path), name))
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "pipe.ckpt")
    os.mkfifo(tmp_path / "m.safetensors.index.json")
    os.symlink("loop.gguf", tmp_path / "loop.gguf")
    os.symlink("gone", tmp_path / "gone.safetensors")
    os.symlink("/dev/zero", tmp_path / "zero.safetensors")
    os.mkdir(tmp_path / "folder.safetensors")
    files = [(name, module.Path(tmp_path, name)) for name in sorted(os.listdir(tmp_path))]
    found = scan(files)
    assert len(found) == len(files) == 11 and sum(one.loads for one in found) == 4
    lines = as_text(found).splitlines()
    assert len(lines) == 2 + 1 + 11 and all(line.isprintable() for line in lines)
    as_text(found).encode()
