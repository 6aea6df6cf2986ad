"""A GGUF file as a source of weights: its blocks are views of its memory map."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from ..files.disk_map import DiskMap, TensorSpec, check_overlap
from ..files.safetensors_header import SourceError
from .header import GgufEntry, is_gguf, parse_header
from .weight import Form, GgufWeight


class GgufMap(DiskMap):
    """A GGUF file. What is quantised there comes as GgufWeight, the rest as ordinary tensors.

    dtype: that the quantised weights stand for. Where None, fp16 in a file that has tensors of it and none of bf16,
    else bf16.
    """

    def _describe(
        self, file: BinaryIO, keep: Callable[[str], bool] | None, rename: Callable[[str], str] | None
    ) -> dict[str, TensorSpec]:
        header = parse_header(self.path, file)
        self.file_bytes = header.file_bytes
        self.metadata = {key: value for key, value in header.metadata.items() if isinstance(value, str)}
        self.gguf_metadata = header.metadata
        self.left_out = []
        self.blocks: dict[str, GgufEntry] = {}
        specs: dict[str, TensorSpec] = {}
        for key, entry in header.entries.items():
            if keep is not None and not keep(key):
                continue
            name = key if rename is None else rename(key)
            if name in specs:
                raise SourceError(f"{self.path}: two tensors are named '{name}' after renaming '{key}'.")
            if entry.kind.dtype is None:
                self.blocks[name] = entry
                shape: tuple[int, ...] = (entry.nbytes // entry.kind.nbytes, entry.kind.nbytes)
                specs[name] = TensorSpec(torch.uint8, shape, entry.offset, entry.nbytes)
            else:
                specs[name] = TensorSpec(getattr(torch, entry.kind.dtype), entry.shape, entry.offset, entry.nbytes)
        check_overlap(self.path, specs)
        kinds = {entry.kind.name for entry in header.entries.values()}
        self.stands_for = torch.float16 if "F16" in kinds and "BF16" not in kinds else torch.bfloat16
        return specs

    def tensor(self, key: str) -> torch.Tensor:
        view = super().tensor(key)
        entry = self.blocks.get(key)
        if entry is None:
            return view
        return GgufWeight(view, Form(entry.kind.name, entry.shape, self.dtype or self.stands_for))


def open_map(path: str | os.PathLike[str]) -> DiskMap:
    """Open a file of weights as what its name says: GGUF or safetensors. Raises SourceError for what is neither."""
    return GgufMap(path) if is_gguf(Path(path)) else DiskMap(path)
