"""Several files of weights as one mapping, such as the parts that a model was divided into."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from .disk_map import DiskMap
from .safetensors_header import MissingTensor, SourceError


class DiskMaps(Mapping[str, torch.Tensor]):
    """Several files as one mapping from key to tensor, which may be the source of a dynamic model.

    options: those of `DiskMap`, for each file. Raises SourceError for a file that is none, or where two files have one
    key.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]], **options: Any) -> None:
        self.maps = [DiskMap(path, **options) for path in paths]
        self.path = ", ".join(str(disk_map.path) for disk_map in self.maps)
        self._holder: dict[str, DiskMap] = {}
        for disk_map in self.maps:
            for key in disk_map:
                other = self._holder.setdefault(key, disk_map)
                if other is not disk_map:
                    raise SourceError(
                        f"tensor '{key}' is in two files, {other.path} and {disk_map.path}. Name only the files of one "
                        "model."
                    )

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def _map_of(self, key: str) -> DiskMap:
        try:
            return self._holder[key]
        except KeyError:
            raise MissingTensor(f"{self.path}: no tensor '{key}' in any of these files.") from None

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._map_of(key)[key]

    def tensor(self, key: str) -> torch.Tensor:
        """Return the tensor as a view of its map. Nothing is read until its elements are."""
        return self._map_of(key).tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._holder)

    def __len__(self) -> int:
        return len(self._holder)

    def __contains__(self, key: object) -> bool:
        return key in self._holder

    def check(self) -> None:
        """Raise FileChanged where one of the files has changed since it was opened."""
        for disk_map in self.maps:
            disk_map.check()
