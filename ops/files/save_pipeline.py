"""Deferred tensors into a file: read ahead, compute, write behind, with a few parts in memory at a time."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..gather import memory_of
from .deferred import Deferred, Part, Recipe, drop_pages, read_ahead
from .disk_map import check_files
from .safetensors_writer import SafetensorsWriter, SavedSpec, file_order

# Parts that wait to be written while the next is computed.
WAITING = 2
# Bytes of the sources that the system is asked to read ahead.
AHEAD_BYTES = 64 << 20


class Written(NamedTuple):
    """A file that is complete under its name. nbytes: its size."""

    path: Path
    nbytes: int


class _Job(NamedTuple):
    """Tensors that are computed together. keys: name of a part -> the keys that it is saved under."""

    recipe: Recipe
    keys: dict[str, list[str]]


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Deferred],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    overwrite: bool = False,
    counted: bool = False,
    journal: Path | None = None,
) -> Written:
    """Write a safetensors file. overwrite, counted, journal: as for PartialFile.

    progress: called with (bytes of tensors computed so far, bytes of all). An error that it raises ends the saving.
    Raises SaveError, FileExistsError, and FileChanged where a file that is read has changed. After any error a file of
    that name is as it was, and no other is left.
    """
    specs = {key: SavedSpec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    jobs = _jobs(tensors, specs)
    total = sum(spec.nbytes for spec in specs.values())
    with SafetensorsWriter(path, specs, metadata, overwrite=overwrite, counted=counted, journal=journal) as writer:
        done, ahead, requested = 0, 0, 0
        progress(0, total)
        with _Behind(writer, specs) as behind:
            for index, job in enumerate(jobs):
                while ahead < len(jobs) and (ahead <= index or requested < AHEAD_BYTES):
                    requested += _read_ahead(jobs[ahead].recipe)
                    ahead += 1
                for part in job.recipe.parts():
                    for key in job.keys.get(part.name, ()):
                        behind.put(key, part)
                        done += part.data.numel() * part.data.element_size()
                        progress(done, total)
                requested -= _size(job.recipe)
                read = [inner for tensor in job.recipe.sources() for inner in memory_of(tensor)]
                check_files(read)  # what another program wrote meanwhile must not be saved
                behind.drop(read)
        for job in jobs:  # what was put last may be a view, which the thread has read since
            check_files([inner for tensor in job.recipe.sources() for inner in memory_of(tensor)])
    return Written(writer.path, writer.file_bytes)


def _jobs(tensors: Mapping[str, Deferred], specs: Mapping[str, SavedSpec]) -> list[_Job]:
    """Return the jobs, in the order in which the largest tensor of each lies in the file."""
    by_recipe: dict[int, _Job] = {}
    at: dict[int, int] = {}
    largest: dict[int, int] = {}
    for place, key in enumerate(file_order(specs)):
        tensor = tensors[key]
        job = by_recipe.setdefault(id(tensor.recipe), _Job(tensor.recipe, {}))
        job.keys.setdefault(tensor.part, []).append(key)
        nbytes = specs[key].nbytes
        if nbytes > largest.get(id(tensor.recipe), -1):
            largest[id(tensor.recipe)], at[id(tensor.recipe)] = nbytes, place
    return [by_recipe[name] for name in sorted(by_recipe, key=lambda name: at[name])]


def _size(recipe: Recipe) -> int:
    inner = [part for tensor in recipe.sources() for part in memory_of(tensor)]
    return sum(part.numel() * part.element_size() for part in inner)


def _read_ahead(recipe: Recipe) -> int:
    for tensor in recipe.sources():
        for inner in memory_of(tensor):
            read_ahead(inner)
    return _size(recipe)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class _Behind:
    """Writes parts in a thread of its own. An error there is raised by the next `put`, and at the end."""

    def __init__(self, writer: SafetensorsWriter, specs: Mapping[str, SavedSpec]) -> None:
        self._writer, self._specs = writer, specs
        self._queue: queue.Queue[tuple[str, int, memoryview] | list[torch.Tensor] | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="spillway-save", daemon=True)

    def __enter__(self) -> _Behind:
        self._thread.start()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is not None and self._error is None:
            self._error = RuntimeError("the saving was given up")  # makes the thread write no more
        self._queue.put(None)
        self._thread.join()
        if error_type is None and self._error is not None:
            raise self._error

    def put(self, key: str, part: Part) -> None:
        """Have a part written. Waits while WAITING parts are on their way."""
        if self._error is not None:
            raise self._error
        spec = self._specs[key]
        if part.data.dtype != spec.dtype or tuple(part.data.shape[1:]) != spec.shape[1:]:
            raise ValueError(
                f"'{key}' was planned as {spec.shape} {spec.dtype} and made as {tuple(part.data.shape)} "
                f"{part.data.dtype}"
            )
        rows = spec.shape[0] if spec.shape else 1
        start = part.start * (spec.nbytes // rows) if rows else 0
        self._queue.put((key, start, as_bytes(part.data)))

    def drop(self, read: list[torch.Tensor]) -> None:
        """Have the pages of what was read given back, after the parts that were put before: they may be views of it."""
        self._queue.put(read)

    def _run(self) -> None:
        # Emptied to the end also after an error. Else `put` would wait for room for ever.
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    if isinstance(item, list):
                        for tensor in item:
                            drop_pages(tensor)
                    else:
                        self._writer.write(*item)
                except BaseException as error:
                    self._error = error
            del item
