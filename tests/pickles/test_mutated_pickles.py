"""Mutated pickles: an error that names the file, or the tensors that torch reads too. Nothing is run or opened."""

import contextlib
import encodings.cp437  # noqa: F401 - of names in zip archives, else imported when one is first met
import io
import os
import random
import sys
import time
import zipfile

import psutil
import pytest
import torch

from kit.pickles import Calls, forms, model
from spillway.ops.files.disk_map import SourceError
from spillway.ops.pickles.convert import _opened

EVENTS = ("os.", "subprocess.", "shutil.", "socket.", "ctypes.dlopen", "import", "open")
QUIET = ("os.fwalk", "os.listdir")
watched = None  # a list while a file is read


def note(event, arguments):
    if watched is None or not event.startswith(EVENTS):
        return
    name = str(arguments[0]) if arguments else ""
    if event == "open" and name.startswith(("/proc/", "/sys/")):  # how much memory there is
        return
    if event in ("import", "open") and name.startswith(("torch.", os.path.dirname(torch.__file__))):  # as torch is used
        return
    watched.append((event, name))


def originals():
    """The bytes of right files, of both formats, and of some that ask for a call."""
    files = []
    for seed, (name, value) in enumerate(forms(model()).items()):
        files.append(written(value))
        files.append(written(forms(model(seed, old=True))[name], old=True))
    files.append(written({"a": torch.zeros(3), "b": Calls(os.system, "echo")}))
    return files


def written(value, old=False):
    data = io.BytesIO()
    torch.save(value, data, _use_new_zipfile_serialization=not old)
    return data.getvalue()


def mutated(data, rng):
    """Bytes changed, lost, added or moved: anywhere, or in the pickle alone, which a right archive then holds."""
    if data.startswith(b"PK") and rng.random() < 0.6:
        changed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(changed, "w") as new:
            for info in old.infolist():
                entry = old.read(info)
                if info.filename.endswith("data.pkl") or rng.random() < 0.02:
                    entry = some_bytes(entry, rng)
                if rng.random() < 0.98:
                    new.writestr(info.filename, entry)
        return changed.getvalue()
    return some_bytes(data, rng)


def some_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.3:  # the parts that say what lies where
            at = rng.choice([rng.randrange(min(len(data), 300) + 1), max(0, len(data) - rng.randrange(1, 300))])
        kind, some = rng.randrange(5), rng.randbytes(rng.randint(1, 4))
        if kind == 0:
            data[at : at + len(some)] = some
        elif kind == 1:
            data[at:at] = some
        elif kind == 2:
            del data[at : at + len(some)]
        elif kind == 3:
            data[at : at + 1] = bytes([rng.choice(b"cRiobq(t.0]}\x80\x8c\x93Q\xff\x00")])
        elif rng.random() < 0.2:
            del data[at:]
        else:
            data[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"])
        if not data:
            break
    return bytes(data)


def check(data, path):
    """Return whether the file was read."""
    global watched
    path.write_bytes(data)
    watched, words, tensors = [], None, {}
    try:
        tensors, _ = _opened(path)
    except SourceError as error:
        words = str(error)
    finally:
        seen, watched = watched, None
    assert [event for event in seen if event[0] not in QUIET and str(path) not in event[1]] == []
    if words is not None:
        assert str(path) in words and len(words) < 2000
        return False
    with contextlib.suppress(Exception):  # a wrong checksum does not make a number wrong
        theirs = torch.load(path, weights_only=True)
        flat = {id(value): value for value in every_tensor(theirs)}
        for key, tensor in tensors.items():
            mine = tensor.contiguous().reshape(-1).view(torch.uint8)
            assert any(
                value.shape == tensor.shape
                and value.dtype == tensor.dtype
                and torch.equal(value.detach().contiguous().reshape(-1).view(torch.uint8), mine)
                for value in flat.values()
            ), key
    assert all(tensor.device.type == "cpu" for tensor in tensors.values())
    sum(float(tensor.to(torch.float32).sum()) for tensor in tensors.values() if tensor.numel() < 1 << 20)
    return True


def every_tensor(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from every_tensor(one)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.fuzz)])
def test_mutated(count, tmp_path):
    rng, path, process = random.Random(count), tmp_path / "m.ckpt", psutil.Process()
    files = originals()
    assert all(check(data, path) for data in files[:-1]) and not check(files[-1], path)  # and imports what it needs
    sys.addaudithook(note)
    before, read = process.memory_info().rss, 0
    for _ in range(count):
        begun = time.perf_counter()
        read += check(mutated(rng.choice(files), rng), path)
        assert time.perf_counter() - begun < 5.0
    assert count / 50 < read < count * 0.9, "mutations that always, or never, make a file unreadable try nothing"
    assert process.memory_info().rss - before < 300e6
    assert os.listdir(tmp_path) == [path.name]
