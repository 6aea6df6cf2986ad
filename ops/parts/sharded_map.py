"""A model in several safetensors files as one source of weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..files.disk_map import DiskMap, SourceError
from ..files.disk_maps import DiskMaps
from .index import read_index


class ShardedMap(DiskMaps):
    """The files that an index names, which lie beside it.

    Raises SourceError where a part is missing or damaged, lacks a tensor that the index says it has, or has one that
    another part has too.
    """

    def __init__(self, path: str | os.PathLike[str], opens: Callable[[Path], DiskMap] = DiskMap) -> None:
        """opens: what makes a map of each part."""
        super().__init__(())
        index = read_index(path)
        self.path, self._opens = Path(path), opens
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
            self._add(part)
            self.metadata = {**part.metadata, **self.metadata}
        self.left_out = [key for part in self.maps for key in part.left_out]
        self.file_bytes = sum(part.file_bytes for part in self.maps)
        self.read_only = any(part.read_only for part in self.maps)

    @property
    def files(self) -> tuple[DiskMap, ...]:
        """The maps that the state dict's tensors lie in."""
        return tuple(self.maps)

    def _open(self, name: str, keys: list[str], number: int, count: int) -> DiskMap:
        path = self.path.parent / name
        if not path.is_file():
            raise SourceError(
                f"{self.path}: part {number} of {count}, '{name}', is missing. It has {len(keys)} tensors, such as "
                f"'{keys[0]}'. Put it beside the index."
            )
        return self._opens(path)

    def _twice(self, key: str, one: DiskMap, other: DiskMap) -> str:
        return (
            f"{self.path}: '{key}' is in '{other.path.name}' and in '{one.path.name}'; expected each tensor in one "
            "part. Get all parts again."
        )

    def _missing(self, key: str) -> str:
        some = ", ".join(list(self)[:3])
        return f"{self.path}: no tensor '{key}'. There are {len(self)}, such as {some}."
