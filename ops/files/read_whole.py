"""Reads small safetensors files into memory, where nothing that happens to the file can reach them."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch

from ..ram.available import available_ram
from ..ram.shortage import obtain
from .coming_file import coming_of
from .disk_map import DiskMap, tensor_specs
from .safetensors_header import open_file, parse_header
from .watched_file import WatchedFile

# The part of the RAM that this process can have which one file may take. A larger one is mapped.
SHARE = 4


def read_whole(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a file -> (tensors, metadata). A file too large for the memory is mapped, and its tensors lie in the map.

    Raises SourceError for a file that is no whole safetensors file, FileChanged for one that is being written.
    """
    path = Path(path)
    with open_file(path) as file:
        watched = WatchedFile(path, file.fileno(), coming_of(file))
        header = parse_header(path, file)
        if header.file_bytes * SHARE > available_ram().available:
            return _mapped(path)
        specs = tensor_specs(header)
        size = header.file_bytes
        memory = obtain(lambda: mmap.mmap(-1, size), size, f"{path}: reading this file")
        file.seek(0)
        file.readinto(memory)  # type: ignore[attr-defined]
        watched.check()
    tensors = {}
    for key, spec in specs.items():
        if spec.nbytes:
            count = spec.nbytes // spec.dtype.itemsize
            flat = torch.frombuffer(memory, dtype=spec.dtype, count=count, offset=spec.offset)
            tensors[key] = flat.view(spec.shape)
        else:
            tensors[key] = torch.empty(spec.shape, dtype=spec.dtype)
    return tensors, header.metadata


def _mapped(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    disk_map = DiskMap(path)
    tensors = disk_map.state_dict()
    for tensor in tensors.values():
        tensor.disk_map = disk_map  # type: ignore[attr-defined]  # known as a map for as long as a tensor is used
    return tensors, disk_map.metadata
