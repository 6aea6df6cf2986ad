"""The header of a safetensors file, checked. Needs no torch.

Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..errors import SpillwayError
from .coming_file import coming_file

# The limit of the format's reference implementation.
MAX_HEADER_BYTES = 100_000_000
MAX_ELEMENTS = 1 << 59  # 16 bytes each are still an int64
GGUF = b"GGUF"  # with which such a file begins
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# Of a model in several of them: pytorch_model.bin.index.json, and pytorch_model.bin.index.fp16.json for a variant.
PICKLED_INDEX = re.compile(r"\.bin\.index(\.\w+)?\.json$", re.IGNORECASE)
AGAIN = "Download or copy the file again."


class SourceError(SpillwayError, ValueError):
    """A file or a key that cannot be used: names the file, the key, what was expected and what to do."""


class MissingFile(SourceError, FileNotFoundError):
    """A file that is not there. Whoever opens files expects FileNotFoundError for one."""


class FolderFound(SourceError, IsADirectoryError):
    """A folder where a file was expected."""


class MissingTensor(SourceError, KeyError):
    """A key that a file does not have. A mapping raises KeyError for one."""

    __str__ = Exception.__str__  # KeyError's own puts the sentence in quotes


@dataclass(frozen=True)
class Entry:
    """What the header says of a tensor. start, end: bytes from where the tensors begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """base: bytes from the start of the file to where the tensors begin. entries: as they stand there, unchecked."""

    path: Path
    file_bytes: int
    base: int
    metadata: dict[str, str]
    entries: dict[str, Any]

    def entry(self, key: str) -> Entry:
        """Return a tensor's entry. Raises SourceError where it is malformed."""
        entry = self.entries[key]
        try:
            name, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sizes = [*shape, start, end]
            if not isinstance(name, str) or any(type(n) is not int or n < 0 for n in sizes):
                raise TypeError
            # torch counts the elements of an empty tensor too.
            if math.prod(max(1, n) for n in shape) > MAX_ELEMENTS:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise SourceError(
                f"{self.path}: tensor '{key}': expected dtype, shape and data_offsets in the header, found {entry!r}. "
                "The file is damaged: download or copy it again."
            ) from None
        return Entry(name, tuple(shape), start, end)

    def check_place(self, key: str, entry: Entry, nbytes: int) -> None:
        """Raise SourceError unless the tensor of `nbytes` fills its offsets, and they lie in the file."""
        if entry.end - entry.start != nbytes:
            raise SourceError(
                f"{self.path}: tensor '{key}' of {entry.dtype} {list(entry.shape)} needs {nbytes} bytes, its offsets "
                f"hold {entry.end - entry.start}. The file is damaged: download or copy it again."
            )
        if self.base + entry.end > self.file_bytes:
            raise SourceError(
                f"{self.path}: truncated: tensor '{key}' ends at byte {self.base + entry.end}, the file has "
                f"{self.file_bytes}. {AGAIN}"
            )


def is_pickle(path: str | os.PathLike[str]) -> bool:
    """Say whether a file is a pickle, or the index of several, by its name."""
    name = Path(path).name
    return name.lower().endswith(PICKLES) or PICKLED_INDEX.search(name) is not None


def converted(path: Path) -> Path:
    """Return the safetensors file beside a pickle, or the index of several, that it is converted to."""
    index = PICKLED_INDEX.search(path.name)
    stem = path.stem if index is None else f"{path.name[: index.start()]}{index[1] or ''}"
    return path.with_name(f"{stem}.safetensors")


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read a file's header, and nothing else of it. Raises SourceError for a file of another format."""
    with open_file(path) as file:
        return parse_header(Path(path), file)


def open_file(path: str | os.PathLike[str], *, pickles: bool = False) -> BinaryIO:
    """Open a file to read. Raises SourceError for a folder, or nothing, and for a pickle unless `pickles`.

    A file that is coming is found under the name that it will have.
    """
    path = Path(path)
    if is_pickle(path) and not pickles:
        what = "this is the index of" if path.suffix.lower() == ".json" else f"{path.suffix} files are"
        raise SourceError(
            f"{path}: {what} pickles, which may run code. "
            + (
                f"'{converted(path).name}' lies beside it: choose that one."
                if converted(path).is_file()
                else "Convert it once, without running it, with the node Convert to Safetensors (Spillway) or `python "
                "dev.py convert FILE`. Then load the safetensors file."
            )
        )
    coming = coming_file(path)
    if coming is not None:
        return coming.open()
    if not path.is_file():
        if path.is_dir():
            raise FolderFound(f"{path}: is a folder; name the safetensors file in it.")
        raise MissingFile(f"{path}: no such file.")
    return open(path, "rb")


Parsed = TypeVar("Parsed")


def names_its_file(parse: Callable[[Path, BinaryIO], Parsed]) -> Callable[[Path, BinaryIO], Parsed]:
    """Have the system's errors name the file. Of one that is open they say only what happened."""

    @functools.wraps(parse)
    def parsed(path: Path, file: BinaryIO) -> Parsed:
        try:
            return parse(path, file)
        except OSError as error:
            raise unreadable(path, error) from error

    return parsed


def unreadable(path: Path, error: OSError) -> SourceError:
    """Word the error for a file that the system does not read."""
    return SourceError(f"{path}: it cannot be read: {error.strerror or error}. Is its disk there, and whole?")


@names_its_file
def parse_header(path: Path, file: BinaryIO) -> Header:
    """Return the header of an open file. path: for messages. Raises SourceError for what is no safetensors file."""
    file_bytes = os.fstat(file.fileno()).st_size
    head = file.read(8)
    if len(head) < 8:
        raise SourceError(f"{path}: the file has {file_bytes} bytes; a safetensors file begins with 8 bytes. {AGAIN}")
    (length,) = struct.unpack("<Q", head)
    if head.startswith(GGUF):
        raise SourceError(f"{path}: this is a GGUF file under the name of another format. Call it .gguf.")
    if length > MAX_HEADER_BYTES:
        raise SourceError(
            f"{path}: the header would be {length} bytes long, so this is not a safetensors file. If it is a pickle "
            "with a wrong name, call it .ckpt and convert it with the node Convert to Safetensors (Spillway)."
        )
    if 8 + length > file_bytes:
        raise SourceError(f"{path}: truncated inside its header ({file_bytes} of at least {8 + length} bytes). {AGAIN}")
    text = file.read(length)
    try:
        header = json.loads(str(text, "utf-8"))  # of bytes it would take UTF-16 too
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: the header is not JSON ({error}). {AGAIN}") from None
    if not isinstance(header, dict):
        raise SourceError(f"{path}: the header is a {type(header).__name__}, not an object. {AGAIN}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise SourceError(f"{path}: __metadata__ is {metadata!r}, not an object. {AGAIN}")
    return Header(path, file_bytes, 8 + length, metadata, header)
