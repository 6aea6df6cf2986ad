"""Converts pickles to safetensors, a few rows at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ..files.deferred import Deferred, Stored
from ..files.disk_map import SourceError
from ..files.safetensors_header import PICKLES, converted, is_pickle, open_file, read_header
from ..files.save_pipeline import save
from ..ledger import in_words
from ..parts.index import is_pickled_index, refuse_part
from ..parts.sharded_map import ShardedMap
from ..ram.available import available_ram
from .archive import is_archive, refuse_zeros
from .pickle_map import PickleMap, check_growth
from .reader import state_dict_of, unpickle, without_numbers

# Says in the safetensors file what it was made from.
MADE_FROM = "spillway_made_from"


class Converted(NamedTuple):
    """A file that is complete under its name. new: whether it was written now. tensors, nbytes: of the file."""

    path: Path
    new: bool
    tensors: int
    nbytes: int

    @property
    def words(self) -> str:
        """Return the same for a person."""
        did = "wrote" if self.new else "was converted before:"
        return f"{did} {self.path} ({self.tensors:,} tensors, {in_words(self.nbytes)})"


def convert(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    journal: Path | None = None,
) -> Converted:
    """Write the tensors of a pickle as a safetensors file of the same name. folder: to write to; None for beside it.

    path: of a file, or of the index of a model in several, of which all become one. A file that was converted there
    before is left as it is. Shared tensors are written once for each of their names.
    progress, journal: as for `save`. Raises SourceError for a pickle that is not a file of tensors or would run
    something, SaveError, and FileExistsError where another file has the name.
    """
    path = Path(path)
    if not is_pickle(path):
        raise SourceError(
            f"{path}: only {', '.join(PICKLES)} files are converted, and their indexes. Choose one of these."
        )
    refuse_part(path)
    target = (path.parent if folder is None else Path(folder)) / converted(path).name
    tensors, digest = _opened(path)
    there = _made_before(target, digest)
    if there is not None:
        return there
    deferred = {key: Deferred.of(Stored(value), tuple(value.shape), value.dtype) for key, value in tensors.items()}
    metadata = {"format": "pt", MADE_FROM: digest}
    written = save(target, deferred, metadata, progress=progress, journal=journal)
    return Converted(written.path, True, len(tensors), written.nbytes)


def _opened(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Return the tensors, in the file's map where it can be mapped, and a digest of the file."""
    if is_pickled_index(path):
        maps: list[PickleMap] = ShardedMap(path, PickleMap).maps  # type: ignore[assignment]
        digests = "".join(f"{source.path.name}\0{source.digest}\0" for source in maps)
        digest = hashlib.sha256(digests.encode("utf-8", "surrogateescape")).hexdigest()
        return {key: value for source in maps for key, value in _mapped(source).items()}, digest
    with open_file(path, pickles=True) as file:
        if not is_archive(file):
            return _read_whole(path)
    source = PickleMap(path)
    return _mapped(source), source.digest


def _mapped(source: PickleMap) -> dict[str, torch.Tensor]:
    tensors = source.state_dict()
    for tensor in tensors.values():
        tensor.disk_map = source  # type: ignore[attr-defined]  # known as a map for as long as a tensor is used
    return tensors


def _read_whole(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Read a file as torch wrote it before 2020, which cannot be mapped."""
    with open_file(path, pickles=True) as file:
        size, room = os.fstat(file.fileno()).st_size, available_ram().available
        if 2 * size > room:
            raise SourceError(
                f"{path}: a file of this age is read as a whole. It has {in_words(size)}, and {in_words(room)} of RAM "
                "are free. Convert it on a machine with more, or get the model as safetensors."
            )
        digest, before = hashlib.sha256(), b""
        file.seek(0)
        while block := file.read(1 << 20):
            digest.update(block)
            refuse_zeros(path, before + block)
            before = block[-32:]
        tensors = state_dict_of(path, unpickle(path, file, "cpu"))
        for key, tensor in tensors.items():
            if tensor.is_meta:
                raise without_numbers(path, key)
        check_growth(path, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), size)
    return tensors, digest.hexdigest()


def _made_before(target: Path, digest: str) -> Converted | None:
    if not target.is_file():
        return None
    try:
        header = read_header(target)
    except SourceError:
        return None
    if header.metadata.get(MADE_FROM) != digest:
        return None
    return Converted(target, False, len(header.entries), header.file_bytes)
