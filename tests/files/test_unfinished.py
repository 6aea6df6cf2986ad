"""The notes of unfinished files: whatever lies among them stops no sweep, and no save needs them."""

import contextlib
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from spillway.ops.files.deferred import Deferred, Stored
from spillway.ops.files.partial_file import MAX_NOTE_BYTES, PartialFile, sweep, sweep_noted
from spillway.ops.files.save_pipeline import save

linux = pytest.mark.skipif(sys.platform != "linux", reason="what only Linux has")


def junk(folder):
    """name -> a function that makes it in `folder`, with that name; all but the first ones stay where they are."""
    other = folder.parent / "other"

    def note(data):
        return lambda path: path.write_bytes(data)

    found = {
        "binary": note(bytes(range(256)) * 8),
        "empty": note(b""),
        "NUL": note(b"/tmp/\0/.spillway-0123.partial"),
        "newline": note(b"/tmp/nowhere\n/.spillway-0123.partial"),
        "overlong": note(b"/" + b"x" * 5000 + b"/.spillway-0123.partial"),
        "overlong name": note(os.fsencode(folder) + b"/.spillway-" + b"x" * 5000 + b".partial"),
        "UTF-16": note("/tmp/.spillway-0123.partial".encode("utf-16")),
        "under a file": note(os.fsencode(other) + b"/.spillway-0123.partial"),
        "gone": note(os.fsencode(folder.parent) + b"/gone/.spillway-0123.partial"),
        "not ours": note(os.fsencode(other)),
    }
    kept = {
        "huge": lambda path: path.open("wb").truncate(50 << 30),
        "large": note(b"x" * (MAX_NOTE_BYTES + 1)),
        "folder": lambda path: (path / "with").mkdir(parents=True),
        "of a folder": note(os.fsencode(folder.parent) + b"/.spillway-folder.partial"),
    }
    if sys.platform != "win32":
        kept |= {
            "link in a loop": lambda path: path.symlink_to(path),
            "link to nothing": lambda path: path.symlink_to("nowhere"),
            "link to a file": lambda path: path.symlink_to(other),
            "pipe": os.mkfifo,
            "socket": lambda path: bind(path),
            "of a pipe": note(os.fsencode(folder.parent) + b"/.spillway-pipe.partial"),
            "of a loop": note(os.fsencode(folder.parent) + b"/.spillway-loop.partial"),
        }
    return found, kept


def bind(path):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as one:
        one.bind(str(path))


@pytest.fixture
def journal(tmp_path):
    folder = tmp_path / "journal"
    folder.mkdir()
    (tmp_path / "other").write_bytes(b"somebody's")
    (tmp_path / ".spillway-folder.partial").mkdir()
    if sys.platform != "win32":
        os.mkfifo(tmp_path / ".spillway-pipe.partial")
        (tmp_path / ".spillway-loop.partial").symlink_to(".spillway-loop.partial")
    return folder


NAMES = [name for kind in junk(Path("/a/b")) for name in kind]


@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_a_sweep_survives(journal, name):
    """What was left behind is removed, what is no note stays, and what is no file of ours is never touched."""
    left = journal.parent / ".spillway-4567.partial"
    left.write_bytes(b"half")
    notes, kept = junk(journal)
    made = {one: make for one, make in (notes | kept).items() if name in (one, "all")}
    for one, make in made.items():
        make(journal / one)
    (journal / "zz").write_bytes(os.fsencode(left))
    before = set(os.listdir(journal.parent))
    assert sweep_noted(journal) == [left]
    assert set(os.listdir(journal)) == set(made) & set(kept)
    assert set(os.listdir(journal.parent)) == before - {left.name}
    assert (journal.parent / "other").read_bytes() == b"somebody's"
    assert sweep_noted(journal) == sweep(journal.parent) == []


@linux
@pytest.mark.parametrize("folder", ["/proc/self", "/proc/self/fdinfo", "/dev", "/sys/kernel/mm"])
def test_a_folder_that_nobody_may_write_to(folder):
    """Not even root: files that cannot be read, have no end, or cannot be removed."""
    before = set(os.listdir(folder))
    assert sweep_noted(Path(folder)) == []
    if folder != "/proc/self/fdinfo":
        assert set(os.listdir(folder)) == before


def no_journal(folder):
    """Folders that no note can be written to."""
    yield "a file", folder / "file"
    yield "under a file", folder / "file" / "journal"
    yield "a loop", folder / "loop"
    yield "overlong", folder / ("x" * 300)
    if sys.platform == "linux":
        yield "read only", Path("/proc/spillway")
        yield "full", Path("/dev/full")


@pytest.mark.parametrize("name", [name for name, _ in no_journal(Path("/a"))])
def test_a_save_needs_no_journal(tmp_path, name, caplog):
    if name == "a loop" and sys.platform == "win32":
        pytest.skip("links need a privilege there")
    (tmp_path / "file").write_bytes(b"somebody's")
    if sys.platform != "win32":
        (tmp_path / "loop").symlink_to("loop")
    journal = dict(no_journal(tmp_path))[name]
    tensors = {"a": Deferred.of(Stored(torch.arange(4.0)), (4,), torch.float32)}
    save(tmp_path / "model.safetensors", tensors, journal=journal)
    assert "cannot be noted as unfinished" in caplog.text
    with pytest.raises(FileExistsError):
        save(tmp_path / "model.safetensors", tensors, journal=journal)
    assert sweep_noted(journal) == [] and (tmp_path / "file").read_bytes() == b"somebody's"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".spillway")]


def test_a_note_that_cannot_be_removed_spoils_no_save(tmp_path):
    """The journal goes away, or becomes something else, while a file is being written."""
    made = PartialFile(tmp_path / "a", journal=tmp_path / "journal")
    (note,) = (tmp_path / "journal").iterdir()
    note.unlink()
    note.mkdir()
    (note / "with").mkdir()
    made.file.write(b"whole")
    made.commit()
    assert (tmp_path / "a").read_bytes() == b"whole"
    other = PartialFile(tmp_path / "b", journal=tmp_path / "journal")
    (note,) = (one for one in (tmp_path / "journal").iterdir() if one.is_file())
    note.unlink()
    other.discard()
    assert sorted(os.listdir(tmp_path)) == ["a", "journal"]


@linux
def test_names_that_are_no_text(tmp_path):
    """Names are bytes there: one that is no UTF-8 is noted and found as well."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    folder.mkdir()
    made = PartialFile(folder / "a", journal=tmp_path / "journal")
    path = made.path
    del made  # as when its process dies
    assert sweep_noted(tmp_path / "journal") == [path] and not os.listdir(folder)
