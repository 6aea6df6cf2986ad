"""A GGUF file as a source of weights: its blocks are views of its memory map."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import BinaryIO

import torch

from ..files.disk_map import DiskMap, TensorSpec, check_overlap, kept_names
from ..files.safetensors_header import SourceError
from .header import GgufEntry, is_gguf, parse_header
from .names import BY_ARCHITECTURE, renaming
from .weight import Form, GgufWeight

UMT5_TOKENS = 256384
Rename = Callable[[str], str]


class GgufMap(DiskMap):
    """A GGUF file. What is quantised there comes as GgufWeight, the rest as ordinary tensors. Names are the model's.

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
        by_model = renaming(str(header.metadata.get("general.architecture", "")))
        self._is_text_encoder = by_model is not None
        specs: dict[str, TensorSpec] = {}
        for key, name in kept_names(self.path, header.entries, keep, _both(by_model, rename)):
            entry = header.entries[key]
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
            # llama.cpp writes norms in fp32. ComfyUI would take that for the dtype of the whole encoder.
            small = self._is_text_encoder and view.dim() < 2 and view.dtype == torch.float32
            return view.to(self.stands_for) if small else view
        return GgufWeight(view, Form(entry.kind.name, entry.shape, self.dtype or self.stands_for))


def _both(first: Rename | None, second: Rename | None) -> Rename | None:
    """Return what renames by the one, then by the other."""
    if first is None or second is None:
        return first or second
    return lambda key: second(first(key))


def check_text_encoder(path: str) -> None:
    """Raise SourceError for a GGUF file whose text encoder cannot be made of what is in it."""
    if not is_gguf(path):
        return
    source = GgufMap(path)
    architecture = source.metadata.get("general.architecture", "")
    if renaming(architecture) is None:
        raise SourceError(
            f"{path}: text encoders of architecture '{architecture}' are not read from GGUF files. Known: "
            f"{', '.join(BY_ARCHITECTURE)}. Use the encoder's safetensors file."
        )
    table = "shared.weight"
    if table in source and source.tensor(table).shape[0] == UMT5_TOKENS:
        raise SourceError(
            f"{path}: this is a UMT5, of which a GGUF file lacks the tokenizer that ComfyUI needs. Use the encoder's "
            "safetensors file."
        )


def open_map(path: str | os.PathLike[str]) -> DiskMap:
    """Open a file of weights as what its name says: GGUF or safetensors. Raises SourceError for what is neither."""
    return GgufMap(path) if is_gguf(path) else DiskMap(path)
