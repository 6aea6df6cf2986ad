"""Pickles become safetensors files with the same numbers. None is run, and what cannot be read is refused by name."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kit.nets import same
from kit.pickles import MARK, compressed, forms, malicious, model
from kit.shards import write_shards
from spillway.ops.files.disk_map import SourceError
from spillway.ops.files.safetensors_header import converted
from spillway.ops.files.safetensors_writer import SaveError
from spillway.ops.files.watched_file import FileChanged
from spillway.ops.parts.folder import weights_of
from spillway.ops.parts.open_map import open_map
from spillway.ops.pickles import reader
from spillway.ops.pickles.convert import convert
from spillway.ops.pickles.probe import probe

CONVERT = Path(__file__).resolve().parents[1] / "kit" / "processes" / "convert_pickle.py"


@pytest.fixture(params=["zip", "zip, as torch 2.8 reads it", "before 2020"])
def old(request, monkeypatch):
    """Whether a pickle is written as before 2020. Torch 2.8 does not say where the numbers of a tensor on meta lie."""
    if "2.8" in request.param:
        monkeypatch.setattr(reader, "_tells_places", lambda: False)
    return request.param == "before 2020"


@pytest.mark.parametrize("form", forms({}))
def test_the_tensors_of_a_pickle(form, old, tmp_path):
    """Shared, transposed, expanded, empty: each key has its own numbers, and what is no tensor is left out."""
    path = tmp_path / "m.ckpt"
    saved = model(old=old)
    torch.save(forms(saved)[form], path, _use_new_zipfile_serialization=not old)
    wanted = {key: value.detach() for key, value in saved.items() if isinstance(value, torch.Tensor)}
    done = convert(path)
    assert done.path == tmp_path / "m.safetensors" and done.new and done.tensors == len(wanted)
    prefix = "module." if form == "parallel" else ""
    found = load_file(done.path)
    assert set(found) == {prefix + key for key in wanted}
    assert all(same(found[prefix + key], value) for key, value in wanted.items())
    assert sorted(os.listdir(tmp_path)) == ["m.ckpt", "m.safetensors"]


def test_into_another_folder_once_and_never_over_another_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.save(model(ord(name)), tmp_path / name / "m.pt")
    done = [convert(tmp_path / "a" / "m.pt", tmp_path) for _ in range(2)]
    assert [one.new for one in done] == [True, False] and done[0][2:] == done[1][2:]
    assert "was converted before" in done[1].words and done[0].words.startswith("wrote ")
    with pytest.raises(FileExistsError, match=r"m\.safetensors exists already"):
        convert(tmp_path / "b" / "m.pt", tmp_path)
    with pytest.raises(SaveError, match="Create the folder"):
        convert(tmp_path / "b" / "m.pt", tmp_path / "none")
    with pytest.raises(SourceError, match=r"only \.ckpt, .* are converted"):
        convert(done[0].path)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 2020"])
def test_an_interrupt_leaves_nothing(old, tmp_path):
    torch.save(model(old=old), tmp_path / "m.pth", _use_new_zipfile_serialization=not old)
    seen = []

    def interrupt(done, total):
        seen.append((done, total))
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "m.pth", progress=interrupt)
    assert os.listdir(tmp_path) == ["m.pth"] and len(seen) > 3


def test_a_file_that_wants_to_run_something_is_refused_and_not_run(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    for name, (data, words) in malicious(tmp_path).items():
        path = files / f"{name.replace(' ', '_')}.pt"
        path.write_bytes(data)
        with pytest.raises(SourceError, match=words) as error:
            convert(path)
        assert str(path) in str(error.value), name
        assert not (tmp_path / MARK).exists(), name
    assert not list(files.glob("*.safetensors")) and len(list(files.iterdir())) > 20


def test_all_parts_of_a_pickled_model_become_one_file(tmp_path):
    """By its index. A part alone is named as one, and the loaders say what to convert."""
    tensors = {key: value.detach() for key, value in model().items() if isinstance(value, torch.Tensor)}
    index = write_shards(tmp_path, tensors, stem="pytorch_model", pickled=True)
    assert probe(index).words.count("in 3 files")
    with pytest.raises(SourceError, match=r"index\.json: this is the index of pickles.*Convert it once"):
        open_map(index)
    part = tmp_path / "pytorch_model-00002-of-00003.bin"
    for use in (convert, open_map):
        words = r"part 2 of 3 of 'pytorch_model'.*Choose 'pytorch_model\.bin\.index\.json'.*Convert to Safetensors"
        with pytest.raises(SourceError, match=words):
            use(part)
    with pytest.raises(SourceError, match=r"only pickles here, such as 'pytorch_model\.bin\.index\.json'"):
        weights_of(tmp_path)
    done = [convert(index) for _ in range(2)]
    assert [one.new for one in done] == [True, False]
    found = load_file(tmp_path / "pytorch_model.safetensors")
    assert set(found) == set(tensors) and all(same(found[key], tensors[key]) for key in tensors)
    assert weights_of(tmp_path) == done[0].path == converted(index)
    with pytest.raises(SourceError, match=r"'pytorch_model\.safetensors' lies beside it: choose that one"):
        open_map(index)
    torch.save({"base": torch.zeros(1)}, part)  # another file under the name of a part
    with pytest.raises(SourceError, match=r"is not in 'pytorch_model-00002|is in 'pytorch"):
        convert(index)
    part.unlink()
    with pytest.raises(SourceError, match=r"part \d of 3, 'pytorch_model-00002-of-00003\.bin', is missing"):
        convert(index)
    index.unlink()
    with pytest.raises(SourceError, match=r"other parts and the model's index, 'pytorch_model\.bin\.index\.json'"):
        convert(tmp_path / "pytorch_model-00001-of-00003.bin")


def test_no_part_of_a_pickled_model_is_run_or_read_outside_of_its_folder(tmp_path):
    for number, (name, (data, words)) in enumerate(malicious(tmp_path).items()):
        folder = tmp_path / str(number)
        index = write_shards(folder, {"a": torch.zeros(2), "b": torch.ones(2)}, count=2, stem="m", pickled=True)
        (folder / "m-00002-of-00002.bin").write_bytes(data)
        with pytest.raises(SourceError, match=f"{words}|no zip archive") as error:
            convert(index)
        assert "m-00002-of-00002.bin" in str(error.value) and not (tmp_path / MARK).exists(), name
        assert not (folder / "m.safetensors").exists()
    index = write_shards(tmp_path / "x", {"a": torch.zeros(2)}, count=1, pickled=True, a="../0/m-00001-of-00002.bin")
    with pytest.raises(SourceError, match="It is not opened"):
        convert(index)


PARTS = {
    "of safetensors": lambda path: save_file({"b": torch.ones(2)}, path),
    "older": lambda path: torch.save({"b": torch.ones(2)}, path, _use_new_zipfile_serialization=False),
    "an error page": lambda path: path.write_bytes(b"<html>"),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "an index": lambda path: path.write_bytes(path.with_name("m.bin.index.json").read_bytes()),
    "no tensors": lambda path: torch.save({"lr": 0.1}, path),
    "sparse": lambda path: torch.save({"b": torch.eye(2).to_sparse()}, path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_part_that_is_no_pickle_of_tensors_is_named_with_what_to_do(kind, tmp_path):
    index = write_shards(tmp_path, {"a": torch.zeros(2), "b": torch.ones(2)}, count=2, stem="m", pickled=True)
    PARTS[kind](tmp_path / "m-00002-of-00002.bin")
    with pytest.raises(SourceError, match=r"m-00002-of-00002\.bin.* (again|safetensors|beside|Save|Choose)") as error:
        convert(index)
    assert len(str(error.value)) < 600 and "Convert it" not in str(error.value)  # a part alone is not converted
    assert not (tmp_path / "m.safetensors").exists() and len(os.listdir(tmp_path)) == 3


def test_a_part_that_changes_while_it_is_converted_is_an_error_and_leaves_nothing(tmp_path):
    index = write_shards(tmp_path, {"a": torch.zeros(2), "b": torch.ones(2)}, count=2, stem="m", pickled=True)
    part = tmp_path / "m-00002-of-00002.bin"

    def cut(*_):
        if part.exists():
            part.write_bytes(part.read_bytes()[:100])

    with pytest.raises(FileChanged, match=r"m-00002-of-00002\.bin"):
        convert(index, progress=cut)
    assert not (tmp_path / "m.safetensors").exists() and len(os.listdir(tmp_path)) == 3


WRONG = {
    "no tensors": ({"lr": 0.1}, "expected tensors by name, found none"),
    "a list": ([torch.zeros(2)], "holds a list"),
    "several": ({"a": {"x": torch.zeros(1)}, "b": {"x": torch.ones(1)}}, "under 'a', 'b', and not which"),
    "a number for a name": ({1: torch.zeros(2)}, "named 1, not by a text"),
    "half a character for a name": ({"a\ud800": torch.zeros(2)}, "named 'a.ud800', which is no text"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "'a' is a Tensor .*sparse|holds a sparse tensor"),
    "a lazy sign": ({"a": torch.ones(2, dtype=torch.complex64).conj().imag}, "'a' is a Tensor .* as it lies"),
    "a lazy conjugate": ({"a": torch.ones(2, dtype=torch.complex64).conj()}, "'a' is a Tensor .* as it lies"),
    "no numbers at all": ({"a": torch.empty(3, device="meta")}, "'a' has no numbers"),
    "complex in half": (
        {"a": torch.zeros(2, dtype=torch.complex32)},
        "'a' has dtype torch.complex32|torch cannot read",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_model_is_refused_by_name(name, old, tmp_path):
    value, words = WRONG[name]
    torch.save(value, tmp_path / "m.bin", _use_new_zipfile_serialization=not old)
    with pytest.raises((SourceError, SaveError), match=words):
        convert(tmp_path / "m.bin")
    assert os.listdir(tmp_path) == ["m.bin"]


def test_another_file_under_the_name_of_a_pickle(tmp_path):
    path = tmp_path / "m.pt"
    for data in (b"", b"PK\3\4", b"PK\3\4" + bytes(100), b"GGUF" + bytes(50), b"<html>", compressed(path_of(tmp_path))):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=r"m\.pt: "):
            convert(path)
    with pytest.raises(SourceError, match="no such file"):
        convert(tmp_path / "none.pt")


def test_numbers_beyond_the_entry_of_a_tensor_are_not_read(tmp_path):
    """They would be those of another tensor, or what lies between."""
    saved = io.BytesIO(path_of(tmp_path))
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(tmp_path / "m.pt", "w") as new:
        for info in old.infolist():
            entry = old.read(info)
            new.writestr(info.filename, entry[:-4] if info.filename.endswith("data/0") else entry)
    with pytest.raises(
        SourceError, match=r"m\.pt: tensor '\w+' of torch\.\w+ .* needs the bytes \d+ to (\d+) of its entry"
    ):
        convert(tmp_path / "m.pt")
    assert not (tmp_path / "m.safetensors").exists()


def path_of(folder):
    """The bytes of a right file."""
    torch.save(model(), folder / "right")
    return (folder / "right").read_bytes()


@pytest.mark.parametrize("megabytes", [250, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the peak")
def test_converting_takes_little_memory(megabytes, tmp_path):
    """Of a pickle a part of each weight is in memory at a time."""
    command = [sys.executable, str(CONVERT), str(tmp_path), str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert found["file"] > megabytes * 1e6 and found["same"]
    assert found["peak"] < 100e6
