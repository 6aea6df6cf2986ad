"""Takes all memory figures of one moment, and words the difference of two moments."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy
import torch

from ..ops.files.disk_map import DiskMap, open_maps
from ..ops.ledger import in_words
from ..ops.ram import allocator
from ..ops.ram.available import available_ram, process_bytes, this_process

# Fields that reports mention, and their names there.
NAMES = {
    "rss": "process",
    "anonymous": "of it private",
    "page_cache": "page cache of model files",
    "pinned": "pins",
    "resident": "weights on devices",
    "vram_allocated": "torch allocated",
    "vram_reserved": "torch reserved",
    "aimdo": "comfy-aimdo",
    "cached": "output cache",
    "arena_free": "allocator, free but held",
    "available": "available RAM",
}
WORTH_A_WORD = 1 << 20
# Of the page cache: files of up to so many pages are counted, of larger ones so many places are looked at.
COUNTED_PAGES = 1 << 13
PLACES = 512


@dataclass(frozen=True)
class MemorySnapshot:
    """All memory figures of one moment, in bytes. Figures that the system does not give are 0.

    rss: all memory of this process. anonymous: its part that no file backs. page_cache: pages of the open model files
    that are in RAM, whichever process read them. pinned, resident: pins and device memory of dynamic models. vram_*:
    torch's allocator on all devices. aimdo: device memory that comfy-aimdo has mapped. cached: RAM that the output
    cache holds. arena_free: free memory that the C library has not given back. reason: names the limit of `available`.
    limit, stalled: its kind, and how long tasks waited for memory, as `ops.ram.available` has them.
    """

    rss: int = 0
    anonymous: int = 0
    page_cache: int = 0
    pinned: int = 0
    resident: int = 0
    vram_allocated: int = 0
    vram_reserved: int = 0
    aimdo: int = 0
    cached: int = 0
    arena_free: int = 0
    available: int = 0
    total: int = 0
    reason: str = ""
    limit: str = ""
    stalled: float = 0.0
    devices: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def take(cls, *, pinned: int = 0, resident: int = 0, cached: int = 0) -> MemorySnapshot:
        """Take the figures of now. The caller gives those of the models and of the cache."""
        state, devices = available_ram(), torch_memory()
        return cls(
            rss=this_process().memory_info().rss,
            anonymous=process_bytes(),
            page_cache=sum(cached_bytes(disk_map) for disk_map in open_maps()),
            pinned=pinned,
            resident=resident,
            vram_allocated=sum(device["allocated"] for device in devices.values()),
            vram_reserved=sum(device["reserved"] for device in devices.values()),
            aimdo=aimdo_bytes(),
            cached=cached,
            arena_free=allocator.arenas().get("free", 0),
            available=state.available,
            total=state.total,
            reason=state.reason,
            limit=state.kind,
            stalled=state.stalled,
            devices=devices,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return asdict(self)

    def in_words(self) -> str:
        """Word the figures in one line, without those that are 0."""
        parts = [f"{name} {in_words(value)}" for key, name in NAMES.items() if (value := getattr(self, key))]
        return ", ".join(parts)

    def difference(self, later: MemorySnapshot) -> str:
        """Word the changes until `later`, without those under 1 MiB."""
        parts = []
        for key, name in NAMES.items():
            change = getattr(later, key) - getattr(self, key)
            if abs(change) >= WORTH_A_WORD:
                parts.append(f"{name} {'+' if change > 0 else '-'}{in_words(abs(change))}")
        return ", ".join(parts) or "no change"


def torch_memory() -> dict[str, dict[str, int]]:
    """Return bytes by device: allocated and reserved by torch, free, total. Devices not used yet are left out."""
    devices = {}
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind, None)
        if module is None or not module.is_available() or not module.is_initialized():
            continue
        for index in range(module.device_count()):
            free, total = module.mem_get_info(index)
            devices[f"{kind}:{index}"] = {
                "allocated": module.memory_allocated(index),
                "reserved": module.memory_reserved(index),
                "free": free,
                "total": total,
            }
    mps = getattr(torch, "mps", None)
    if mps is not None and torch.backends.mps.is_available():
        total = mps.recommended_max_memory()
        reserved = mps.driver_allocated_memory()
        devices["mps"] = {
            "allocated": mps.current_allocated_memory(),
            "reserved": reserved,
            "free": total - reserved,
            "total": total,
        }
    return devices


def aimdo_bytes() -> int:
    """Return the bytes of device memory that comfy-aimdo has mapped. 0 where it is not in use."""
    control = sys.modules.get("comfy_aimdo.control")
    if control is None or getattr(control, "lib", None) is None or not getattr(control, "devctxs", None):
        return 0
    return int(control.get_total_vram_usage())


def cached_bytes(disk_map: DiskMap) -> int:
    """Count the bytes of a mapped file that are in the page cache. 0 on systems without mincore.

    A large file is looked at in places, and its cached stretches are known to within a stretch between two places: to
    ask for each page of 24 GB takes a tenth of a second, with Python's lock, for each report.
    """
    if sys.platform == "win32" or not disk_map.file_bytes:
        return 0
    pages = -(-disk_map.file_bytes // mmap.PAGESIZE)
    if pages <= COUNTED_PAGES:
        present = (ctypes.c_ubyte * pages)()
        if _mincore(ctypes.c_void_p(disk_map.address), ctypes.c_size_t(disk_map.file_bytes), present):
            return 0
        resident = float((numpy.frombuffer(present, dtype=numpy.uint8) & 1).sum())
    else:
        page, found = (ctypes.c_ubyte * 1)(), 0
        one = ctypes.c_size_t(mmap.PAGESIZE)
        for place in range(PLACES):
            number = pages * (2 * place + 1) // (2 * PLACES)
            if _mincore(ctypes.c_void_p(disk_map.address + number * mmap.PAGESIZE), one, page):
                return 0
            found += page[0] & 1
        resident = pages * found / PLACES
    return min(round(resident) * mmap.PAGESIZE, disk_map.file_bytes)


def _mincore(*args: Any) -> int:
    return _libc().mincore(*args)


@functools.cache
def _libc() -> Any:
    # It keeps Python's lock: getting that back from a thread that computes takes longer than a look at one page.
    return ctypes.PyDLL(None)
