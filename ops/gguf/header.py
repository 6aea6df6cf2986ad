"""The header of a GGUF file, checked. Nothing behind it is read. Needs no torch.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..files.safetensors_header import AGAIN, GGUF, MAX_ELEMENTS, SourceError, names_its_file
from .types import TYPES, GgufType

VERSIONS = (2, 3)
MAX_TENSORS = 1 << 20
MAX_VALUES = 1 << 16  # in the metadata
MAX_DIMENSIONS = 8
MAX_STRING_BYTES = 1 << 24
MAX_HEADER_BYTES = 1 << 28
ALIGNMENT = 32  # where the metadata names no other
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
# By the number of their type in the metadata.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Longer lists are those of tokenizers. Only their place is kept here.
LONGEST_LIST = 1024
WINDOW_BYTES = 1 << 20
TEXT_LENGTH = struct.Struct("<Q")


class LongList(NamedTuple):
    """A list that is not read yet. kind: of its values. offset: of the first one, in bytes from the file's start."""

    kind: int
    length: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufEntry:
    """A tensor. shape: the outermost dimension first. offset: bytes from the start of the file."""

    kind: GgufType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """metadata: numbers, strings and lists of them, by key. One of more than LONGEST_LIST values is a LongList."""

    path: Path
    file_bytes: int
    metadata: dict[str, Any]
    entries: dict[str, GgufEntry]


class _Reader:
    """Reads numbers and strings from the start of a file, and says where a file that ends too early is cut."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self.path, self.file, self.file_bytes = path, file, file_bytes
        self._window, self._start, self._next = b"", 0, 0  # what was read, its place in the file, what comes next in it

    @property
    def at(self) -> int:
        """Say how many bytes from the start of the file the next value lies."""
        return self._start + self._next

    def wrong(self, words: str) -> SourceError:
        return SourceError(f"{self.path}: {words}. The file is damaged: download or copy it again.")

    def need(self, count: int) -> None:
        """Have that many bytes in the window. Raises SourceError where the file has fewer."""
        if self._next + count <= len(self._window):
            return
        if self.at + count > min(self.file_bytes, MAX_HEADER_BYTES):
            raise SourceError(f"{self.path}: truncated inside its header, of {self.file_bytes} bytes. {AGAIN}")
        self._start, self._window, self._next = self.at, self._window[self._next :], 0
        self._window += self.file.read(max(count - len(self._window), WINDOW_BYTES))
        if len(self._window) < count:  # the file has shrunk meanwhile
            raise SourceError(f"{self.path}: truncated inside its header, of {self.file_bytes} bytes. {AGAIN}")

    def take(self, count: int) -> bytes:
        self.need(count)
        self._next += count
        return self._window[self._next - count : self._next]

    def skip(self, count: int) -> None:
        while count:
            part = min(count, WINDOW_BYTES)
            self.need(part)
            self._next += part
            count -= part

    def skip_texts(self, count: int) -> None:
        for _ in range(count):  # of a tokenizer: hundreds of thousands
            if self._next + 8 > len(self._window):
                self.need(8)
            (length,) = TEXT_LENGTH.unpack_from(self._window, self._next)
            self._next += 8
            if length > MAX_STRING_BYTES or self._next + length > len(self._window):
                self.skip(self.at_most(length, MAX_STRING_BYTES, "bytes in one text"))
            else:
                self._next += length

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, most: int, what: str) -> int:
        return self.at_most(self.number("Q"), most, what)

    def at_most(self, found: int, most: int, what: str) -> int:
        if found > most:
            raise self.wrong(f"its header says that it has {found} {what}, where {most} are the most")
        return found

    def string(self) -> str:
        text = self.take(self.count(MAX_STRING_BYTES, "bytes in one text"))
        return text.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise self.wrong(f"its metadata has a value of type {kind}, which the format does not know")
        inner, count = self.number("I"), self.count(MAX_HEADER_BYTES, "values in one list")
        if inner not in NUMBERS and inner != STRING:
            raise self.wrong(f"its metadata has a list of type {inner}, which the format does not know")
        if count > LONGEST_LIST:
            start = self.at
            if inner == STRING:
                self.skip_texts(count)
            else:
                self.skip(count * struct.calcsize("<" + NUMBERS[inner]))
            return LongList(inner, count, start, self.at - start)
        return [self.value(inner) for _ in range(count)]


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Say whether a file's name is that of a GGUF file."""
    return Path(path).suffix.lower() == ".gguf"


@names_its_file
def parse_header(path: Path, file: BinaryIO) -> GgufHeader:
    """Return the header of an open file. path: for messages. Raises SourceError for what is no GGUF file."""
    reader = _Reader(path, file, os.fstat(file.fileno()).st_size)
    magic = reader.take(4)
    if magic != GGUF:
        what, suffix = _other_format(magic, reader)
        if what:
            raise SourceError(f"{path}: this is a {what} under the name of a GGUF file. Call it {suffix}.")
        raise SourceError(f"{path}: a GGUF file begins with {GGUF!r}, this one with {magic!r}. {AGAIN}")
    version = reader.number("I")
    if version not in VERSIONS:
        raise SourceError(
            f"{path}: this GGUF file is of version {version}. Versions 2 and 3 in little-endian order are read: "
            "convert it anew with a current llama.cpp or ComfyUI-GGUF."
        )
    tensors, values = reader.count(MAX_TENSORS, "tensors"), reader.count(MAX_VALUES, "values in its metadata")
    metadata: dict[str, Any] = {}
    for _ in range(values):
        key = reader.string()
        metadata[key] = reader.value(reader.number("I"))
    found: dict[str, tuple[GgufType, tuple[int, ...], int]] = {}
    for _ in range(tensors):
        name = reader.string()
        if name in found:
            raise reader.wrong(f"two tensors are named '{name}'")
        found[name] = _tensor(reader, name)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise reader.wrong(f"its tensors are aligned to {alignment!r} bytes, which is no power of two")
    base = -(-reader.at // alignment) * alignment
    entries = {}
    for name, (kind, shape, offset) in found.items():
        nbytes = math.prod(shape) // kind.numbers * kind.nbytes
        if base + offset + nbytes > reader.file_bytes:
            raise SourceError(
                f"{path}: truncated: tensor '{name}' ends at byte {base + offset + nbytes}, the file has "
                f"{reader.file_bytes}. {AGAIN}"
            )
        entries[name] = GgufEntry(kind, _original(reader, metadata, name, shape), base + offset, nbytes)
    return GgufHeader(path, reader.file_bytes, metadata, entries)


def _other_format(magic: bytes, reader: _Reader) -> tuple[str, str]:
    """Name what begins so, and how such files are called; ("", "") for what is no model file."""
    if magic.startswith((b"PK", b"\x80")):
        return "pickle", ".ckpt"
    # The length of a header comes first, and then the header, which is JSON.
    is_json = reader.file_bytes > 8 and reader.take(5)[4:] == b"{"
    return ("safetensors file", ".safetensors") if is_json else ("", "")


def _tensor(reader: _Reader, name: str) -> tuple[GgufType, tuple[int, ...], int]:
    """Read one tensor's type, shape and offset."""
    dimensions = reader.number("I")
    if dimensions > MAX_DIMENSIONS:
        raise reader.wrong(f"tensor '{name}' has {dimensions} dimensions")
    shape = tuple(reversed([reader.number("Q") for _ in range(dimensions)]))
    number, offset = reader.number("I"), reader.number("Q")
    kind = TYPES.get(number)
    if kind is None:
        known = ", ".join(known.name for known in TYPES.values())
        raise SourceError(
            f"{reader.path}: tensor '{name}' is of GGUF type {number}, which is not known here. Known: {known}. Get "
            "the model in another quantisation."
        )
    if any(size < 1 for size in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise reader.wrong(f"tensor '{name}' has the shape {list(shape)}")
    columns = shape[-1] if shape else 1
    if columns % kind.numbers:
        raise reader.wrong(f"tensor '{name}' has rows of {columns} numbers, {kind.name} has blocks of {kind.numbers}")
    return kind, shape, offset


def _original(reader: _Reader, metadata: dict[str, Any], name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that the tensor had before it was laid out in rows that blocks divide."""
    wanted = metadata.get(ORIGINAL_SHAPE + name)
    if wanted is None:
        return shape
    sizes = wanted if isinstance(wanted, list) else [wanted]
    if any(type(size) is not int or size < 1 for size in sizes) or math.prod(sizes) != math.prod(shape):
        raise reader.wrong(f"tensor '{name}' has the shape {list(shape)}, its original shape is said to be {wanted}")
    return tuple(sizes)
