"""Tells what a pickle holds, from what its pickle says of the tensors. It is not run, and no number is read."""

from __future__ import annotations

import os
from collections import Counter

from ..files.probe import Probe, describe
from ..files.safetensors_header import Entry
from ..files.safetensors_writer import NAMES
from ..parts.index import is_pickled_index
from ..parts.sharded_map import ShardedMap
from .pickle_map import PickleMap


def probe(path: str | os.PathLike[str]) -> Probe:
    """Tell what a file that torch.save wrote holds, or those of an index. Raises SourceError for a program."""
    maps = ShardedMap(path, PickleMap).maps if is_pickled_index(path) else [PickleMap(path)]
    sizes: Counter[str] = Counter()
    entries = {}
    for source in maps:
        for key in source:
            spec = source.spec(key)
            name = NAMES.get(spec.dtype, str(spec.dtype))
            entries[key] = Entry(name, spec.shape, spec.offset, spec.offset + spec.nbytes)
            sizes[name] += spec.nbytes
    found = describe(str(path), sum(source.file_bytes for source in maps), entries, sizes, {}, {})
    found.files = len(maps)
    return found
