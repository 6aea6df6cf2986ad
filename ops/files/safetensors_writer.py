"""Writes a safetensors file tensor by tensor. The header is known from the specs before a tensor is computed.

Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..errors import SpillwayError
from ..ledger import in_words
from ..writable import is_writable
from .disk_map import DTYPES
from .partial_file import PartialFile
from .safetensors_header import MAX_HEADER_BYTES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A disk that is filled to its last byte troubles everybody else on it.
SPARE_BYTES = 1 << 20
NO_ROOM = (errno.ENOSPC, getattr(errno, "EDQUOT", None))


class SaveError(SpillwayError, RuntimeError):
    """A file that could not be written. Names the file, the need and the remedy. Nothing of the file is left."""


@dataclass(frozen=True)
class SavedSpec:
    """Dtype and shape of a tensor that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensor's elements."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def file_order(specs: Mapping[str, SavedSpec]) -> list[str]:
    """Return the keys as they lie in the file, by size of an element and then by name.

    The largest elements come first, so that each tensor is aligned without gaps, which the format forbids.
    """
    return sorted(specs, key=lambda key: (-specs[key].dtype.itemsize, key))


def header_of(specs: Mapping[str, SavedSpec], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of the file before its tensors. Raises SaveError for specs that the format cannot hold."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise SaveError(f"metadata {key!r} is {value!r}: safetensors metadata are texts. Give it as JSON text.")
        if not is_writable(key + value):
            raise SaveError(f"metadata {key!a} cannot be written as UTF-8. Leave it out, or write it anew.")
    end = 0
    for key in file_order(specs):
        spec = specs[key]
        if key == "__metadata__":
            raise SaveError("no tensor can be named '__metadata__' in a safetensors file. Rename it.")
        if not is_writable(key):
            raise SaveError(f"a tensor is named {key!a}, which is no text: it cannot be written as UTF-8. Rename it.")
        if spec.dtype not in NAMES:
            raise SaveError(f"tensor '{key}' has dtype {spec.dtype}, which safetensors files cannot hold. Convert it.")
        begin, end = end, end + spec.nbytes
        entries[key] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise SaveError(
            f"the header would be {len(text)} bytes long; readers refuse more than {MAX_HEADER_BYTES}. "
            "Save without the workflow in the metadata."
        )
    return struct.pack("<Q", len(text)) + text


class SafetensorsWriter:
    """A safetensors file under way. The context manager leaves it complete under its name, or not there at all.

    specs: key -> dtype and shape. Tensors may be written in any order and in parts. overwrite, counted, journal: as for
    PartialFile. path: of the file, which `counted` may change when it is complete. Raises SaveError where the disk has
    no room for the whole file, before a byte is written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Mapping[str, SavedSpec],
        metadata: Mapping[str, str] | None = None,
        *,
        overwrite: bool = False,
        counted: bool = False,
        journal: Path | None = None,
    ) -> None:
        self.path = Path(path)
        self._header = header_of(specs, metadata or {})
        self._specs = dict(specs)
        self._offsets: dict[str, int] = {}
        self.file_bytes = len(self._header)
        for key in file_order(specs):
            self._offsets[key] = self.file_bytes
            self.file_bytes += specs[key].nbytes
        self._left = {key: spec.nbytes for key, spec in specs.items()}
        self._naming = {"overwrite": overwrite, "counted": counted}
        self._journal = journal
        self._partial: PartialFile | None = None

    def __enter__(self) -> SafetensorsWriter:
        self._check_space()
        try:
            self._partial = PartialFile(self.path, **self._naming, journal=self._journal)
        except FileExistsError:
            raise
        except OSError as error:
            raise SaveError(
                f"{self.path}: cannot be written: {error.strerror or error}. Choose a folder that ComfyUI may write "
                "to, or change its permissions."
            ) from error
        try:
            self._put(0, memoryview(self._header))
        except BaseException:
            self._partial.discard()
            raise
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._partial is not None
        try:
            if error_type is None:
                self._check_complete()
                self._partial.commit()
                self.path = self._partial.target
        except FileExistsError as there:
            raise SaveError(f"{there} Save again under another name.") from there
        except OSError as failed:
            raise self._failed(failed) from failed
        finally:
            self._partial.discard()

    def write(self, key: str, start: int, data: memoryview) -> None:
        """Write bytes of a tensor, each byte once. start: bytes from its beginning. Raises SaveError and ValueError."""
        if start < 0 or start + len(data) > self._specs[key].nbytes:
            raise ValueError(f"'{key}' has {self._specs[key].nbytes} bytes, not {start} + {len(data)}")
        self._put(self._offsets[key] + start, data)
        self._left[key] -= len(data)

    def _put(self, offset: int, data: memoryview) -> None:
        assert self._partial is not None
        file = self._partial.file
        try:
            file.seek(offset)
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            raise self._failed(error) from error

    def _check_space(self) -> None:
        try:
            free = shutil.disk_usage(self.path.parent).free
        except OSError as error:
            raise SaveError(f"{self.path}: {error.strerror or error}. Create the folder or choose another.") from error
        if free < self.file_bytes + SPARE_BYTES:
            raise self._no_room(free)

    def _no_room(self, free: int) -> SaveError:
        return SaveError(
            f"{self.path}: the file needs {in_words(self.file_bytes)}, and the disk has {in_words(free)} free. Make "
            "room or save to another disk; what was there is unchanged."
        )

    def _failed(self, error: OSError) -> SaveError:
        if error.errno in NO_ROOM:
            return self._no_room(shutil.disk_usage(self.path.parent).free)
        return SaveError(
            f"{self.path}: writing failed: {error.strerror or error}. The unfinished file was removed; what was there "
            "is unchanged."
        )

    def _check_complete(self) -> None:
        missing = [key for key, left in self._left.items() if left]
        if missing:
            raise SaveError(f"{self.path}: {len(missing)} tensors are not fully written, such as '{missing[0]}'.")
