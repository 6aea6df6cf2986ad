"""Several files of weights as one mapping, such as the parts that a model was divided into."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from .disk_map import DiskMap, TensorSpec
from .safetensors_header import MissingTensor, SourceError


class DiskMaps(Mapping[str, torch.Tensor]):
    """Several files as one mapping from key to tensor, which may be the source of a dynamic model.

    options: those of `DiskMap`, for each file. Raises SourceError for a file that is none, or where two files have one
    key.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]], **options: Any) -> None:
        self.maps: list[DiskMap] = []
        self._holder: dict[str, DiskMap] = {}
        for path in paths:
            self._add(DiskMap(path, **options))
        self.path: Any = ", ".join(str(disk_map.path) for disk_map in self.maps)

    def _add(self, disk_map: DiskMap) -> None:
        for key in disk_map:
            other = self._holder.setdefault(key, disk_map)
            if other is not disk_map:
                raise SourceError(self._twice(key, other, disk_map))
        self.maps.append(disk_map)

    def _twice(self, key: str, one: DiskMap, other: DiskMap) -> str:
        return f"tensor '{key}' is in two files, {one.path} and {other.path}. Name only the files of one model."

    def _missing(self, key: str) -> str:
        return f"{self.path}: no tensor '{key}' in any of these files."

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def _map_of(self, key: str) -> DiskMap:
        try:
            return self._holder[key]
        except KeyError:
            raise MissingTensor(self._missing(key)) from None

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._map_of(key)[key]

    def spec(self, key: str) -> TensorSpec:
        """Return dtype, shape and place of a tensor. Raises MissingTensor for a key that is not there."""
        return self._map_of(key).spec(key)

    def tensor(self, key: str) -> torch.Tensor:
        """Return the tensor as a view of its map. Nothing is read until its elements are."""
        return self._map_of(key).tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._holder)

    def __len__(self) -> int:
        return len(self._holder)

    def __contains__(self, key: object) -> bool:
        return key in self._holder

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all tensors as views of their files' maps."""
        return {key: disk_map.tensor(key) for key, disk_map in self._holder.items()}

    def check(self) -> None:
        """Raise FileChanged where one of the files has changed since it was opened. Wait until all have come."""
        for disk_map in self.maps:
            disk_map.check()
