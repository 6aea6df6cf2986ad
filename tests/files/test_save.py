"""Saving: the files are right, whatever ends a saving leaves nothing, and what stood under the name still does."""

import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from kit.pack import ROOT
from spillway.ops.files.deferred import PART_BYTES, Assembling, Deferred, Made, Part, Recipe, Stored, row_ranges, whole
from spillway.ops.files.disk_map import DTYPES, DiskMap
from spillway.ops.files.partial_file import PartialFile, sweep, sweep_noted
from spillway.ops.files.safetensors_writer import SafetensorsWriter, SavedSpec, SaveError
from spillway.ops.files.save_pipeline import save

SAVE_FILES = ROOT / "tests" / "kit" / "processes" / "save_files.py"


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def deferred(tensors):
    return {key: Deferred.of(Stored(tensor), tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


def assert_same(got, wanted):
    assert set(got) == set(wanted)
    for key, tensor in wanted.items():
        assert got[key].dtype == tensor.dtype and got[key].shape == tensor.shape, key
        assert torch.equal(got[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), key


# --- what is written --------------------------------------------------------------------------------------------------


def test_every_dtype(tmp_path):
    """Read back by the reference implementation, odd sizes and shapes included."""
    path = tmp_path / "model.safetensors"
    random_bytes = torch.Generator().manual_seed(1)
    tensors = {}
    for name, dtype in DTYPES.items():
        if dtype is torch.bool:
            tensors[name] = torch.tensor([True, False, True])
            continue
        for suffix, shape in (("odd", (3, 5)), ("empty", (0, 4)), ("scalar", ())):
            count = max(0, torch.empty(shape).numel()) * dtype.itemsize
            raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=random_bytes)
            tensors[f"{name}.{suffix}"] = raw.view(dtype).reshape(shape)
    metadata = {"format": "pt", "prompt": '{"text": "Ä \\" 🌊"}'}
    written = save(path, deferred(tensors), metadata)
    assert written == (path, path.stat().st_size) and os.listdir(tmp_path) == [path.name]
    mapped = DiskMap(path)
    assert mapped.metadata == metadata
    assert_same(mapped.state_dict(), tensors)
    for key in tensors:  # what is not aligned, some readers refuse
        assert mapped.spec(key).offset % mapped.spec(key).dtype.itemsize == 0
    assert_same(safetensors.torch.load_file(path), tensors)


def test_tensors_larger_than_a_part(tmp_path):
    tensors = {"a": numbers(5000, 1111), "b": numbers(1, 3_000_000), "c": numbers(70, 70_000, dtype=torch.bfloat16)}
    assert len(list(row_ranges((5000, 1111)))) > 2
    done = []
    save(tmp_path / "x", deferred(tensors), progress=lambda *state: done.append(state))
    assert_same(safetensors.torch.load_file(tmp_path / "x"), tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert done[0] == (0, total) and done[-1] == (total, total) and len(done) > len(tensors) + 1
    assert done == sorted(done)


def test_rows_are_shared_out_evenly():
    for shape in ((1,), (31, 10), (5000, 1111), (21504, 3072), (70, 70_000), (3, 1 << 24), (0, 5), ()):
        ranges = list(row_ranges(shape))
        rows = shape[0] if shape else 1
        assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])] and ranges[-1][1] == rows
        if len(ranges) > 1:
            row_bytes = 4 * math.prod(shape[1:])
            sizes = [stop - start for start, stop in ranges]
            assert min(sizes) >= 32 and max(sizes) <= max(PART_BYTES // row_bytes + 1, 64)


def test_several_tensors_of_one_computation(tmp_path):
    """They are made once, in the file's order, and not kept for each other."""
    made = []

    class Pair(Recipe):
        def __init__(self, name):
            self.name = name

        def parts(self):
            made.append(self.name)
            yield Part("weight", 0, torch.full((2, 3), 7, dtype=torch.int8))
            yield Part("weight", 2, torch.full((2, 3), 8, dtype=torch.int8))
            yield Part("scale", 0, torch.tensor(0.5))

    tensors = {}
    for name in ("second", "first"):
        recipe = Pair(name)
        tensors[f"{name}.weight"] = Deferred.of(recipe, (4, 3), torch.int8, "weight")
        tensors[f"{name}.scale"] = Deferred.of(recipe, (), torch.float32, "scale")
    save(tmp_path / "x", tensors)
    found = safetensors.torch.load_file(tmp_path / "x")
    assert made == ["first", "second"]
    assert torch.equal(found["first.weight"], torch.tensor([7, 7, 8, 8], dtype=torch.int8)[:, None].expand(4, 3))
    assert found["second.scale"].item() == 0.5


def test_the_same_file_every_time(tmp_path):
    tensors = {f"t{index}": numbers(300, 7, seed=index) for index in range(9)}
    save(tmp_path / "a", deferred(tensors), {"b": "1", "a": "2"})
    save(tmp_path / "b", deferred(dict(reversed(tensors.items()))), {"b": "1", "a": "2"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_from_a_file_in_another_dtype(tmp_path):
    tensors = {f"t{index}": numbers(300, 7, seed=index) for index in range(9)}
    safetensors.torch.save_file(tensors, tmp_path / "source.safetensors")
    source = DiskMap(tmp_path / "source.safetensors")
    save(
        tmp_path / "x",
        {key: Deferred.of(Stored(source.tensor(key), torch.bfloat16), (300, 7), torch.bfloat16) for key in tensors},
    )
    assert_same(safetensors.torch.load_file(tmp_path / "x"), {key: t.bfloat16() for key, t in tensors.items()})


# --- deferred tensors -------------------------------------------------------------------------------------------------


def test_operations_are_noted_and_done_later():
    calls = []

    def make(seed, *shape):
        def now():
            calls.append(seed)
            return numbers(*shape, seed=seed)

        return Deferred.of(Made(now), shape, torch.float32)

    a, b = make(1, 4, 3), make(2, 2, 3)
    joined = torch.cat([a, b]).transpose(0, 1).contiguous()
    half = (a[1:3] * 2).half()
    assert joined.shape == (3, 6) and half.shape == (2, 3) and half.dtype == torch.float16 and not calls
    assert a.contiguous() is a and len(a) == 4 and a.device.type == "meta"
    assert torch.equal(whole(joined), torch.cat([numbers(4, 3, seed=1), numbers(2, 3, seed=2)]).T)
    assert torch.equal(whole(half), (numbers(4, 3, seed=1)[1:3] * 2).half())


def test_assigned_to_parts_of_a_tensor():
    """How ComfyUI joins the query, key and value of a text encoder."""
    q, k = (Deferred.of(Stored(numbers(2, 3, seed=seed)), (2, 3), torch.float32) for seed in (1, 2))
    with Assembling() as assembling:
        out = torch.empty((4, 3), device=q.device, dtype=q.dtype)
        out[0:2] = q
        out[2:4] = k
        unknown = torch.empty((4, 3), device=q.device)
    assert torch.equal(whole(assembling.resolve(out)), torch.cat([numbers(2, 3, seed=1), numbers(2, 3, seed=2)]))
    assert torch.equal(whole(assembling.resolve(torch.ones(2))), torch.ones(2))
    with pytest.raises(ValueError, match="has no data"):
        assembling.resolve(unknown)


# --- errors -----------------------------------------------------------------------------------------------------------


def failing(error):
    def now():
        raise error

    return Deferred.of(Made(now), (4,), torch.float32)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), MemoryError()])
def test_an_error_while_a_tensor_is_made(error, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    tensors = {**deferred({"a": numbers(4), "c": numbers(4)}), "b": failing(error)}
    with pytest.raises(type(error)):
        save(path, tensors, overwrite=True, journal=tmp_path / "journal")
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["journal", path.name] and not os.listdir(tmp_path / "journal")


def test_an_interrupt_by_the_progress(tmp_path):
    class Interrupted(Exception):
        pass

    def progress(done, total):
        if done > total / 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        save(tmp_path / "x", deferred({f"t{index}": numbers(100) for index in range(9)}), progress=progress)
    assert not os.listdir(tmp_path)


def test_no_file_is_replaced_unasked(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match=r"model\.safetensors exists already"):
        save(path, deferred({"a": numbers(4)}))
    path.unlink()

    def appears(done, total):
        path.write_bytes(b"somebody else's")

    with pytest.raises(SaveError, match="exists already"):
        save(path, deferred({"a": numbers(4)}), progress=appears)
    assert path.read_bytes() == b"somebody else's" and os.listdir(tmp_path) == [path.name]
    save(path, deferred({"a": numbers(4)}), overwrite=True)
    assert_same(safetensors.torch.load_file(path), {"a": numbers(4)})


@pytest.mark.parametrize(
    ("part", "because"),
    [
        (Part("", 0, torch.zeros(4, 2)), "made as"),
        (Part("", 0, torch.zeros(4, dtype=torch.float16)), "made as"),
        (Part("", 2, torch.zeros(4)), "has 16 bytes"),
        (Part("", 0, torch.zeros(2)), "not fully written"),
    ],
)
def test_a_tensor_that_is_not_what_was_planned(part, because, tmp_path):
    class Wrong(Recipe):
        def parts(self):
            yield part

    with pytest.raises((ValueError, SaveError), match=because):
        save(tmp_path / "x", {"a": Deferred.of(Wrong(), (4,), torch.float32)})
    assert not os.listdir(tmp_path)


def test_what_the_format_cannot_hold(tmp_path):
    spec = SavedSpec(torch.float32, (1,))
    with pytest.raises(SaveError, match="complex128"):
        SafetensorsWriter(tmp_path / "x", {"a": SavedSpec(torch.complex128, (1,))})
    for given in (({"a \ud800": spec}, {}), ({"a": spec}, {"\ud800": ""}), ({"a": spec}, {"a": "\ud800"})):
        with pytest.raises(SaveError, match="cannot be written as UTF-8"):
            SafetensorsWriter(tmp_path / "x", *given)
    with pytest.raises(SaveError, match="__metadata__"):
        SafetensorsWriter(tmp_path / "x", {"__metadata__": spec})
    with pytest.raises(SaveError, match="are texts"):
        SafetensorsWriter(tmp_path / "x", {"a": spec}, {"n": 3})
    with pytest.raises(SaveError, match="header would be"):
        SafetensorsWriter(tmp_path / "x", {"a": spec}, {"n": "x" * 100_000_001})


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(SaveError, match=r"nowhere.*Create the folder"):
        save(tmp_path / "nowhere" / "x", deferred({"a": numbers(4)}))


def test_room_is_asked_for_first(tmp_path, monkeypatch):
    huge = Deferred.of(Made(lambda: pytest.fail("something was made")), (1 << 50,), torch.float32)
    with pytest.raises(SaveError, match=r"needs 4194304\.0 GiB, and the disk has .* free"):
        save(tmp_path / "x", {"a": huge})
    assert not os.listdir(tmp_path)


def in_a_small_file_system(mode, folder, options):
    """Run save_files.py where `folder` is a tmpfs of its own; its answer, or a skip where the system allows none."""
    script = f'mount -t tmpfs -o {options} none "$1" && exec "$2" "$3" "$4" "$1"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(folder)]
    if shutil.which("unshare") is None:
        pytest.skip("a small file system needs Linux")
    done = subprocess.run([*command, sys.executable, str(SAVE_FILES), mode], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"this system lets no user mount: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_full_disk(tmp_path):
    """Too small from the start; and large enough at first, but filled by somebody else in the middle."""
    answer = in_a_small_file_system("full", tmp_path, "size=8m")
    first, second = answer["said"]
    assert "needs 64.0 MiB, and the disk has 7.0 MiB free" in first
    assert "needs 4.0 MiB, and the disk has 0 B free" in second
    assert answer["same"] and answer["files"] == ["model.safetensors", "other"]


def test_a_read_only_disk(tmp_path):
    answer = in_a_small_file_system("once", tmp_path, "size=4m,ro")
    assert "model.safetensors: cannot be written: Read-only file system" in answer["said"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_limit_on_the_size_of_files(tmp_path):
    """A file system's largest file, or a quota: writing fails in the middle."""
    script = f'ulimit -f 512; exec "{sys.executable}" "{SAVE_FILES}" once "{tmp_path}"'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert "writing failed: File too large" in json.loads(done.stdout)["said"]
    assert not os.listdir(tmp_path)


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="forks after torch was imported, which not every system bears")
def test_killed_at_random_moments(tmp_path):
    """The file is always a whole one, and the next start removes the rest."""
    rng = random.Random(4)
    unfinished = 0
    command = [sys.executable, str(SAVE_FILES), "forever", str(tmp_path)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in range(20):
        print("next", file=parent.stdin, flush=True)
        child = int(parent.stdout.readline())
        time.sleep(rng.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
        assert parent.stdout.readline() == "killed\n"
        path = tmp_path / "model.safetensors"
        if path.exists():
            mapped = DiskMap(path)
            assert len(list(mapped.keys())) == int(mapped.metadata["size"])
            for index in range(int(mapped.metadata["size"])):
                assert bool((mapped.tensor(f"t{index}") == index).all())
        left = sorted(set(os.listdir(tmp_path)) - {"model.safetensors", "journal"})
        unfinished += len(left)
        removed = sweep_noted(tmp_path / "journal")
        assert sorted(found.name for found in removed) == left
        assert not os.listdir(tmp_path / "journal") and set(os.listdir(tmp_path)) <= {"model.safetensors", "journal"}
    parent.stdin.close()
    parent.wait()
    parent.stdout.close()
    assert unfinished >= 5


def test_unfinished_files_of_the_living_are_left_alone(tmp_path):
    alive = PartialFile(tmp_path / "a", journal=tmp_path / "journal")
    (tmp_path / ".spillway-0123.partial").write_bytes(b"left behind")
    (tmp_path / "journal" / "0123").write_text(str(tmp_path / ".spillway-0123.partial"))
    (tmp_path / "journal" / "4567").write_text(str(tmp_path / "picture.png"))
    (tmp_path / "picture.png").write_bytes(b"not ours")
    assert [path.name for path in sweep_noted(tmp_path / "journal")] == [".spillway-0123.partial"]
    (tmp_path / ".spillway-89ab.partial").write_bytes(b"left behind")
    assert [path.name for path in sweep(tmp_path)] == [".spillway-89ab.partial"]
    assert sweep(tmp_path / "nowhere") == [] and sweep_noted(tmp_path / "nowhere") == []
    alive.file.write(b"whole")
    alive.commit()
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert sorted(os.listdir(tmp_path)) == ["a", "journal", "picture.png"] and not os.listdir(tmp_path / "journal")


def test_header_is_what_the_format_says(tmp_path):
    save(tmp_path / "x", deferred({"b": numbers(2), "a": numbers(3, dtype=torch.int8), "c": numbers(1)}))
    data = (tmp_path / "x").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and list(header) == ["b", "c", "a"]
    assert header["a"] == {"dtype": "I8", "shape": [3], "data_offsets": [12, 15]} and len(data) == 8 + length + 15
