"""Memory figures: they follow what is really allocated, mapped and read."""

import json
import mmap
import sys

import pytest
import torch

from kit.own_process import in_own_process
from spillway.cache import snapshot
from spillway.cache.snapshot import MemorySnapshot, aimdo_bytes, cached_bytes
from spillway.ops.device.locked_memory import anonymous
from spillway.ops.files.disk_map import DiskMap

MIB = 1 << 20


def test_an_allocation_shows():
    before = MemorySnapshot.take()
    held = torch.frombuffer(anonymous(64 * MIB), dtype=torch.uint8).fill_(1)  # not from a hole of the allocator
    after = MemorySnapshot.take(pinned=3 * MIB, cached=5 << 30)
    assert after.rss - before.rss > 60 * MIB and after.anonymous - before.anonymous > 60 * MIB
    words = before.difference(after)
    assert "process +6" in words and "pins +3.0 MiB" in words and "output cache +5.0 GiB" in words
    assert after.difference(after) == "no change"
    assert "pins 3.0 MiB" in after.in_words() and "comfy-aimdo" not in after.in_words()
    assert held.numel() and 0 < after.available <= after.total and after.reason


def test_what_shrinks_is_told_too():
    assert MemorySnapshot(pinned=4 * MIB).difference(MemorySnapshot()) == "pins -4.0 MiB"


@pytest.mark.skipif(sys.platform == "win32", reason="no mincore")
def test_page_cache_is_what_is_in_ram_of_the_file(tmp_path, monkeypatch):
    """Of a file with a hole, which was never written, only what was read is in RAM."""
    path, size = tmp_path / "model.safetensors", 64 * MIB
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    disk_map = DiskMap(path)
    assert cached_bytes(disk_map) < 8 * MIB
    # Of a file that is this large, places are looked at.
    assert size // mmap.PAGESIZE > snapshot.COUNTED_PAGES
    disk_map.tensor("weight")[16 * MIB : 32 * MIB].sum()
    in_places = cached_bytes(disk_map)
    with monkeypatch.context() as counted:
        counted.setattr(snapshot, "COUNTED_PAGES", 1 << 40)
        assert 16 * MIB <= cached_bytes(disk_map) and abs(cached_bytes(disk_map) - in_places) <= MIB
    disk_map.tensor("weight").sum()
    assert cached_bytes(disk_map) == disk_map.file_bytes
    assert MemorySnapshot.take().page_cache >= disk_map.file_bytes


def test_nothing_is_started_for_a_report():
    """No device context, and no comfy-aimdo, comes to be because somebody looked."""
    code = (
        "import sys, kit.pack, torch\n"
        "from spillway.cache.snapshot import MemorySnapshot\n"
        "print(MemorySnapshot.take().devices == {} or torch.backends.mps.is_available(), "
        "'comfy_aimdo' in sys.modules, torch.cuda.is_initialized())"
    )
    assert in_own_process(code).split() == ["True", "False", "False"]
    assert aimdo_bytes() == 0
