"""A file that torch.save wrote, as a source of weights. What its pickle says is read, and nothing of it is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from ..files.disk_map import DiskMap, TensorSpec, kept_names
from ..files.safetensors_header import SourceError
from .archive import check_archive, is_archive
from .reader import state_dict_of, unpickle, without_numbers

# A small file of tensors that share their numbers would fill a disk. Models share a few at most.
LARGEST_GROWTH = 16


class PickleMap(DiskMap):
    """The zip archive that torch.save writes. Its tensors are views of the file's map, strided and shared ones too.

    digest: of the names, sizes and checksums of all that is in it. Raises SourceError for any other file, for one that
    would run something, and where a tensor's numbers do not lie within the entry that they belong to.
    """

    pickles = True

    def _describe(
        self, file: BinaryIO, keep: Callable[[str], bool] | None, rename: Callable[[str], str] | None
    ) -> dict[str, TensorSpec]:
        if not is_archive(file):
            raise SourceError(
                f"{self.path}: this is no zip archive; expected one, as torch.save has written since 2020. An older "
                "file can be converted where it is the whole model, and not as a part. Get all parts again, or the "
                "model as safetensors."
            )
        self.file_bytes, self.metadata, self.left_out = file.seek(0, 2), {}, []
        archive = check_archive(self.path, file, self.file_bytes)
        self.digest = archive.digest
        tensors = state_dict_of(self.path, unpickle(self.path, file, "meta"))
        self._strides: dict[str, tuple[int, ...]] = {}
        specs: dict[str, TensorSpec] = {}
        for key, name in kept_names(self.path, tensors, keep, rename):
            specs[name] = self._place(key, tensors[key], archive.entries)
            self._strides[name] = tensors[key].stride()
        check_growth(self.path, sum(one.numel() * one.element_size() for one in tensors.values()), self.file_bytes)
        return specs

    def _place(self, key: str, tensor: torch.Tensor, entries: dict[int, int]) -> TensorSpec:
        shape, storage = tuple(tensor.shape), tensor.untyped_storage()
        begin = getattr(storage, "_checkpoint_offset", None)
        if begin is None:
            raise without_numbers(self.path, key)
        if not tensor.numel():
            return TensorSpec(tensor.dtype, shape, 0, 0)
        steps = zip(shape, tensor.stride(), strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in steps)
        first, nbytes = tensor.storage_offset() * tensor.element_size(), extent * tensor.element_size()
        if first + nbytes > entries.get(begin, 0):
            raise SourceError(
                f"{self.path}: tensor '{key}' of {tensor.dtype} {list(shape)} needs the bytes {first} to "
                f"{first + nbytes} of its entry, which has {entries.get(begin, 0)}. The file is damaged: download or "
                "copy it again."
            )
        return TensorSpec(tensor.dtype, shape, begin + first, nbytes)

    def tensor(self, key: str) -> torch.Tensor:
        spec = self.spec(key)
        if not spec.nbytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        return self._lend(key, spec).as_strided(spec.shape, self._strides[key], 0)


def check_growth(path: Path, nbytes: int, file_bytes: int) -> None:
    """Raise SourceError where the tensors of a file are far larger than the file: they share the same few numbers."""
    if nbytes > LARGEST_GROWTH * file_bytes:
        raise SourceError(
            f"{path}: its tensors would be {nbytes} bytes out of a file of {file_bytes}, as they repeat the same "
            "numbers. Expected a model, in which few are shared. Get the model as safetensors."
        )
