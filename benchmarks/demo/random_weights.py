"""Write a safetensors file of seeded random bf16 weights, tensor by tensor, so that no file has to fit in RAM.

The format is small enough to write by hand: the header's length as a little-endian uint64, the header as JSON, data.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from .progress import Bar

CHUNK = 4 << 20  # elements made at a time: 16 MiB of fp32, small enough for caches to help, large enough to be fast
ALIGNMENT = 64  # of the data's start in the file; a map can then be used in place by vector instructions


@dataclass(frozen=True)
class Fill:
    """One tensor to write: its shape and the normal distribution that its elements are drawn from."""

    shape: tuple[int, ...]
    std: float
    mean: float = 0.0

    @property
    def nbytes(self) -> int:
        """Size in the file: two bytes an element (bf16)."""
        return 2 * prod(self.shape)


def _header(fills: Mapping[str, Fill], note: Mapping[str, str], seed: int) -> bytes:
    # The recipe is part of the header, so that a file made by an older recipe is not taken for this one.
    recipe = hashlib.sha256(repr((seed, list(fills.items()))).encode()).hexdigest()
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "recipe": recipe, **note}}
    offset = 0
    for key, fill in fills.items():
        entries[key] = {"dtype": "BF16", "shape": list(fill.shape), "data_offsets": [offset, offset + fill.nbytes]}
        offset += fill.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Trailing spaces are part of the format: they let the data begin on a boundary.
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def is_complete(path: Path, fills: Mapping[str, Fill], note: Mapping[str, str], seed: int) -> bool:
    """Say whether ``path`` already holds exactly the file that ``write`` would make, by its header and its size."""
    header = _header(fills, note, seed)
    if not path.is_file() or path.stat().st_size != len(header) + sum(f.nbytes for f in fills.values()):
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def write(path: Path, fills: Mapping[str, Fill], note: Mapping[str, str], seed: int) -> None:
    """Write ``fills`` in their order to ``path``, which appears only when complete. ``note`` is the file's metadata."""
    header = _header(fills, note, seed)
    size = len(header) + sum(f.nbytes for f in fills.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < size + (64 << 20):
        raise OSError(
            f"{path.parent} has {free / 1e9:.1f} GB free and {path.name} needs {size / 1e9:.1f} GB: "
            "free some space, or choose another folder or a smaller model"
        )
    generator = torch.Generator().manual_seed(seed)
    scratch = torch.empty(CHUNK)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    done = 0
    try:
        with partial.open("wb") as file, Bar(f"writing {path.name[:18]}", round(size / 1e6), " MB") as bar:
            file.write(header)
            for fill in fills.values():
                left = prod(fill.shape)
                while left:
                    part = scratch[: min(left, CHUNK)].normal_(fill.mean, fill.std, generator=generator)
                    file.write(memoryview(part.to(torch.bfloat16).view(torch.uint8).numpy()))
                    left -= len(part)
                    done += 2 * len(part)
                    bar.update(round((len(header) + done) / 1e6))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def ensure(path: Path, fills: Mapping[str, Fill], note: Mapping[str, str], seed: int) -> Path:
    """Write the file unless a complete one is there already; return its path."""
    if not is_complete(path, fills, note, seed):
        write(path, fills, note, seed)
    return path
