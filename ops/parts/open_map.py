"""Opens whatever holds weights by what its name says."""

from __future__ import annotations

import os

from ..files.disk_map import DiskMap
from ..gguf.gguf_map import GgufMap
from ..gguf.header import is_gguf
from .index import is_index, refuse_part
from .sharded_map import ShardedMap


def open_map(path: str | os.PathLike[str]) -> DiskMap | ShardedMap:
    """Open a file of weights, or the files that an index names. Raises SourceError for what is neither, or a part."""
    if is_index(path):
        return ShardedMap(path)
    refuse_part(path)
    return GgufMap(path) if is_gguf(path) else DiskMap(path)
