"""A model in several safetensors files as one source of weights."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from ..files.disk_map import DiskMap, SourceError, TensorSpec
from .index import read_index


class ShardedMap:
    """The files that an index names. Their tensors are views of the files' maps.

    Has what a DiskMap has for reading. files: the maps. Raises SourceError where a part is missing or damaged, lacks a
    tensor that the index says it has, or has one that another part has too.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        index = read_index(path)
        self.path = Path(path)
        self.files: tuple[DiskMap, ...] = ()
        self._where: dict[str, DiskMap] = {}
        self.metadata: dict[str, str] = {}
        for number, (name, keys) in enumerate(index.parts.items(), 1):
            part = self._open(name, keys, number, len(index.parts))
            left_out = set(part.left_out)
            for key in keys:
                if key not in part and key not in left_out:
                    raise SourceError(
                        f"{self.path}: '{key}' is not in '{name}', where the index says it is. Index and parts are of "
                        "different models, or one is damaged: get all of them again."
                    )
            for key in part.keys():  # noqa: SIM118 - a map is no mapping
                if key in self._where:
                    raise SourceError(
                        f"{self.path}: '{key}' is in '{name}' and in '{self._where[key].path.name}'; expected each "
                        "tensor in one part. Get all parts again."
                    )
                self._where[key] = part
            self.files += (part,)
            self.metadata = {**part.metadata, **self.metadata}
        self.left_out = [key for part in self.files for key in part.left_out]
        self.file_bytes = sum(part.file_bytes for part in self.files)
        self.read_only = any(part.read_only for part in self.files)

    def _open(self, name: str, keys: list[str], number: int, count: int) -> DiskMap:
        path = self.path.parent / name
        if not path.is_file():
            raise SourceError(
                f"{self.path}: part {number} of {count}, '{name}', is missing. It has {len(keys)} tensors, such as "
                f"'{keys[0]}'. Put it beside the index."
            )
        return DiskMap(path)

    def keys(self) -> Iterable[str]:
        """Return the keys, part by part."""
        return self._where.keys()

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def spec(self, key: str) -> TensorSpec:
        """Return dtype, shape and place of a tensor. Raises SourceError for a key that is not there."""
        return self._part(key).spec(key)

    def tensor(self, key: str) -> torch.Tensor:
        """Return the tensor as a view of its file's map. Nothing is read until its elements are."""
        return self._part(key).tensor(key)

    def _part(self, key: str) -> DiskMap:
        try:
            return self._where[key]
        except KeyError:
            some = ", ".join(list(self._where)[:3])
            raise SourceError(
                f"{self.path}: no tensor '{key}'. There are {len(self._where)}, such as {some}."
            ) from None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all tensors as views of their files' maps."""
        return {key: part.tensor(key) for key, part in self._where.items()}

    def check(self) -> None:
        """Raise FileChanged where one of the files has changed since it was opened."""
        for part in self.files:
            part.check()
