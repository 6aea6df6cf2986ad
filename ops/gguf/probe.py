"""Tells what a model file holds, of either format, from its header alone. Needs no torch."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from ..files import probe as safetensors
from ..files.safetensors_header import Entry, open_file
from .header import is_gguf, parse_header


def probe(path: str | os.PathLike[str]) -> safetensors.Probe:
    """Tell what a file holds. Raises SourceError, with the reason, for a file that is not whole."""
    if not is_gguf(path):
        return safetensors.probe(path)
    with open_file(path) as file:
        header = parse_header(Path(path), file)
    sizes: Counter[str] = Counter()
    entries, quantised = {}, {}
    for name, entry in header.entries.items():
        kind = entry.kind.name
        entries[name] = Entry(kind, entry.shape, entry.offset, entry.offset + entry.nbytes)
        sizes[kind] += entry.nbytes
        if entry.kind.dtype is None:
            quantised[name] = kind
    return safetensors.describe(str(path), header.file_bytes, entries, sizes, quantised, header.metadata)
