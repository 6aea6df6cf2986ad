"""Tells what a pickle holds, from what its pickle says of the tensors. It is not run, and no number is read."""

from __future__ import annotations

import os
from collections import Counter

from ..files.probe import Probe, describe
from ..files.safetensors_header import Entry
from ..files.safetensors_writer import NAMES
from .pickle_map import PickleMap


def probe(path: str | os.PathLike[str]) -> Probe:
    """Tell what a file that torch.save wrote holds. Raises SourceError for one that would run something."""
    source = PickleMap(path)
    sizes: Counter[str] = Counter()
    entries = {}
    for key in source.keys():  # noqa: SIM118 - a map is no mapping
        spec = source.spec(key)
        name = NAMES.get(spec.dtype, str(spec.dtype))
        entries[key] = Entry(name, spec.shape, spec.offset, spec.offset + spec.nbytes)
        sizes[name] += spec.nbytes
    return describe(str(path), source.file_bytes, entries, sizes, {}, {})
