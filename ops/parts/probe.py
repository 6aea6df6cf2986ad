"""Tells what a model is, whatever form it has: a file of either format, one in several files, a pickle."""

from __future__ import annotations

import os
from pathlib import Path

from ..files import probe as safetensors
from ..files.safetensors_header import Entry, SourceError, read_header
from ..gguf.probe import probe as probe_file
from .index import is_index, part_words, read_index


def probe(path: str | os.PathLike[str]) -> safetensors.Probe:
    """Tell what a file, or the files of an index, hold. Raises SourceError, with the reason, for what is not whole.

    A part of a model is named as one, with what to choose instead.
    """
    if is_index(path):
        return _sharded(Path(path))
    found = probe_file(path)
    found.part = part_words(path)
    return found


def _sharded(path: Path) -> safetensors.Probe:
    index = read_index(path)
    merged: dict[str, Entry] = {}
    sizes: dict[str, int] = {}
    quantised: dict[str, str] = {}
    metadata: dict[str, str] = {}
    total = 0
    for name, keys in index.parts.items():
        header = read_header(path.parent / name)
        entries, part_sizes = safetensors.checked_entries(header)
        missing = next((key for key in keys if key not in entries), None)
        if missing is not None:
            raise SourceError(
                f"{path}: '{missing}' is not in '{name}', where the index says it is. Index and parts are of different "
                "models, or one is damaged: get all of them again."
            )
        merged |= entries
        for dtype, nbytes in part_sizes.items():
            sizes[dtype] = sizes.get(dtype, 0) + nbytes
        quantised |= safetensors.quantisation(header, entries)
        metadata = {**header.metadata, **metadata}
        total += header.file_bytes
    found = safetensors.describe(str(path), total, merged, sizes, quantised, metadata)
    found.files = len(index.parts)
    return found
