"""Bytes that no later read is to find in the page cache are read past it, and are the file's in every case."""

import mmap
import os

import numpy
import pytest
import torch
from safetensors.torch import load, save_file

from kit.nets import dynamic, same
from kit.sim_device import SimDevice
from kit.skips import skip_loudly
from spillway.ops.files import past_cache
from spillway.ops.files.disk_map import DiskMap, SourceError, read_past_cache
from spillway.ops.files.past_cache import PIECE, in_page_cache
from spillway.ops.lending.pins import Pins
from spillway.ops.ram import available

# Bytes of tensors: of many pieces and of one, ending on a block and beside one, small ones between them.
MIB = 1 << 20
SIZES = (3 * PIECE + 17, 5, MIB, 2 * PIECE, MIB + 4095, 1, PIECE - 1)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "m.safetensors"
    torch.manual_seed(0)
    save_file({f"{n}": torch.randint(0, 256, (size,), dtype=torch.uint8) for n, size in enumerate(SIZES)}, path)
    if not knows_such_reads(path):
        skip_loudly("the file system of temporary files has no reads past the page cache")
    return path


def knows_such_reads(path):
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except (AttributeError, OSError):
        return False
    return True


def forget(path):
    """Let the page cache forget a file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def numbers(path):
    """Read the file whole. Nothing of it stays mapped, which the page cache could not forget."""
    return load(path.read_bytes())


def in_cache(tensor):
    """Return the share of a tensor's whole pages that the page cache has."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = range(start, tensor.data_ptr() + tensor.numel() - mmap.PAGESIZE + 1, mmap.PAGESIZE)
    return sum(map(in_page_cache, pages)) / len(pages)


def read(tensor):
    """Return what is read past the page cache; None where the map is to be read."""
    target = numpy.full(tensor.numel(), 0xFF, numpy.uint8)
    return torch.from_numpy(target) if read_past_cache(target, tensor) else None


def test_every_range_is_the_files_own_and_does_not_stay_in_the_page_cache(path):
    expected = numbers(path)
    forget(path)
    disk_map = DiskMap(path)
    for key in disk_map:
        assert read(disk_map.tensor(key)).equal(expected[key])
    large = [disk_map.tensor(key) for key in disk_map if disk_map.spec(key).nbytes >= MIB]
    assert all(in_cache(tensor) < 0.1 for tensor in large)


def test_what_the_page_cache_has_is_read_from_there(path, monkeypatch):
    disk_map = DiskMap(path)
    disk_map._map.madvise(mmap.MADV_RANDOM)  # without more than is asked for
    tensor, half = disk_map.tensor("0"), SIZES[0] // 2
    forget(path)
    tensor[:half].sum()
    forgotten = in_cache(tensor)
    asked, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, *args: asked.append(args) or preadv(fd, *args))
    assert read(tensor).equal(numbers(path)["0"])
    assert 0.3 < forgotten < 0.9 and 0 < len(asked) <= 3
    forget(path)
    disk_map.tensor("3").sum()
    asked.clear()
    assert read(disk_map.tensor("3")).equal(numbers(path)["3"])
    assert not asked


@pytest.mark.parametrize("how", ["by torch", "by numpy"])
def test_a_range_that_was_written_into_is_read_from_the_map(path, how):
    """Its pages are the only copy of what was written."""
    disk_map = DiskMap(path)
    tensor = disk_map.tensor("0")
    if how == "by torch":
        tensor[PIECE] += 1
    else:
        tensor.numpy()[PIECE] += 1
    forget(path)
    assert read(tensor) is None
    assert read(disk_map.tensor("3")) is not None, "another range of the same file"


@pytest.mark.parametrize("fails", ["open", "preadv", "short"])
def test_where_such_reads_fail_the_map_is_read(path, monkeypatch, fails):
    preadv, opened = os.preadv, os.open

    def refuse(name, flags, *args):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(name, flags, *args)

    def fail(fd, buffers, offset):
        if fails == "preadv":
            raise OSError(5, "Input/output error")
        return min(4096, preadv(fd, buffers, offset))

    monkeypatch.setattr(*((os, "open", refuse) if fails == "open" else (os, "preadv", fail)))
    forget(path)
    disk_map = DiskMap(path)
    assert read(disk_map.tensor("0")) is None
    assert disk_map.tensor("0").equal(numbers(path)["0"])


def test_memory_outside_of_files_is_not_read_so():
    assert read(torch.zeros(MIB, dtype=torch.uint8)) is None


class Wide(torch.nn.Module):
    """Layers of megabytes, with small weights beside them."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(700, 700) for _ in range(4)])
        self.norm = torch.nn.LayerNorm(700)

    def forward(self, x):
        for layer in self.layers:
            x = self.norm(layer(x))
        return x


@pytest.fixture
def wide(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "wide.safetensors"
    save_file(Wide().state_dict(), path)
    if not knows_such_reads(path):
        skip_loudly("the file system of temporary files has no reads past the page cache")
    return path


@pytest.mark.parametrize("is_short", [True, False])
@pytest.mark.parametrize("pinned_bytes", [0, 3 << 20])
@pytest.mark.parametrize("vram_bytes", [0, 4 << 20])
def test_a_step_reads_past_the_page_cache_where_ram_is_short(wide, monkeypatch, is_short, pinned_bytes, vram_bytes):
    monkeypatch.setattr(available, "unused_ram", lambda: 0)
    asked, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, *args: asked.append(args) or preadv(fd, *args))
    reference = Wide()
    reference.load_state_dict(numbers(wide))
    with torch.no_grad():
        expected = reference(torch.ones(1, 700))
    forget(wide)
    monkeypatch.setattr(Pins, "outgrow_ram", property(lambda self: is_short, lambda self, value: None), raising=False)
    model = dynamic(Wide, wide, device=SimDevice(), vram_bytes=vram_bytes, pinned_bytes=pinned_bytes)
    weights = [bundle.params[0].source for bundle in model.bundles if bundle.nbytes > MIB]
    with torch.no_grad():
        for _ in range(3):
            assert same(model(torch.ones(1, 700)), expected)
    assert bool(asked) == is_short
    assert len(weights) == 4
    model.close()
    cached = [in_cache(weight.view(torch.uint8).view(-1)) for weight in weights]
    assert all(share < 0.2 for share in cached) if is_short else all(share > 0.9 for share in cached)


def test_a_file_that_changed_is_an_error_there_too(wide, monkeypatch):
    monkeypatch.setattr(available, "unused_ram", lambda: 0)
    monkeypatch.setattr(Pins, "outgrow_ram", property(lambda self: True, lambda self, value: None), raising=False)
    model = dynamic(Wide, wide, device=SimDevice(), vram_bytes=0, pinned_bytes=0)
    forget(wide)
    with open(wide, "r+b") as file:
        file.seek(-MIB, os.SEEK_END)
        file.write(bytes(4096))
    with torch.no_grad(), pytest.raises(SourceError, match="written to while it was in use"):
        model(torch.ones(1, 700))


def test_each_thread_has_one_memory_for_it(path):
    disk_map = DiskMap(path)
    forget(path)
    assert read(disk_map.tensor("0")) is not None
    before = past_cache._memory()
    assert read(disk_map.tensor("3")) is not None
    assert past_cache._memory() is before and len(before) == PIECE
