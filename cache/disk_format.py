"""The bytes of an output on disk: its tensors, then JSON that says what they are, then the JSON's length and hash.

Nothing is pickled. Anybody may have written the bytes, so each is checked before it is believed: nothing in a file can
raise anything but ValueError or OSError, hang, or ask for more memory than the file is large.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import json
import math
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

MAGIC = b"spillway output 3\n"
TRAILER = struct.Struct("<Q32s")
MAX_JSON_BYTES = 16 << 20
# Outputs of nodes are trees of a few hundred items, a few levels deep.
MAX_ITEMS = 20_000
MAX_DEPTH = 32
MAX_DIMENSIONS = 64
CHUNK = 4 << 20
LITERALS = (type(None), bool, int, float, str)
MAX_INT = 1 << 63
DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class NotStorable(TypeError):
    """Raised for an output that holds something other than ordinary tensors, containers and literals."""


class Stopped(Exception):
    """Raised when somebody asked for the writing to stop."""


@dataclass
class Description:
    """An output as JSON data. tensors: those that it names by number."""

    tree: Any
    tensors: list[torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in a file."""
        return sum(_nbytes(tensor) for tensor in self.tensors)

    @property
    def copied(self) -> int:
        """Bytes of the largest tensor that must be copied to be written."""
        return max(
            (_nbytes(one) for one in self.tensors if one.device.type != "cpu" or not one.is_contiguous()), default=0
        )


@dataclass
class Record:
    """What is said about an entry. stamps: JSON data of the caller. tensors: (dtype, shape, bytes) of each."""

    name: str
    kind: str
    seconds: float
    stamps: Any
    tree: Any
    tensors: list[tuple[torch.dtype, list[int], int]]
    data: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(size for _, _, size in self.tensors)


# -- describing


def describe(outputs: Any) -> Description:
    """Say in JSON data what an output is. Raises NotStorable."""
    found = Description(None, [])
    found.tree = _Describer(found.tensors).say(outputs, 0)
    return found


class _Describer:
    """Walks through an output. A closure that calls itself would keep the tensors until a garbage collection."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        self.numbers: dict[int, int] = {}
        self.items = 0

    def say(self, value: Any, depth: int) -> Any:
        self.items += 1
        if self.items > MAX_ITEMS or depth > MAX_DEPTH:  # it may hold itself, or one list twice at each of fifty levels
            raise NotStorable
        if type(value) is torch.Tensor:
            return {"tensor": self.number(value), "device": str(value.device)}
        if type(value) in (list, tuple):
            return {type(value).__name__: [self.say(item, depth + 1) for item in value]}
        if type(value) is dict and all(type(key) is str for key in value):
            return {"dict": [[key, self.say(item, depth + 1)] for key, item in value.items()]}
        if type(value) in LITERALS and (type(value) is not int or -MAX_INT <= value < MAX_INT):
            return {"literal": value}
        raise NotStorable

    def number(self, value: torch.Tensor) -> int:
        if id(value) not in self.numbers:
            if value.layout is not torch.strided or value.is_meta or value.requires_grad or value.is_quantized:
                raise NotStorable
            self.numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self.numbers[id(value)]


def is_storable(outputs: Any) -> bool:
    """Say whether an output can be described."""
    try:
        describe(outputs)
    except NotStorable:
        return False
    return True


# -- writing


def plain_hash(data: bytes) -> bytes:
    """Seal an entry so that damage shows. Whoever can write the file can make it anew: see `keyed_hash`."""
    return hashlib.blake2b(data, digest_size=32).digest()


def keyed_hash(key: bytes) -> Callable[[bytes], bytes]:
    """Return the HMAC of a key, with which nobody can seal an entry who does not know it."""
    return lambda data: hmac.digest(key, data, "sha256")


def write(
    file: BinaryIO,
    found: Description,
    about: Mapping[str, Any],
    stop: Callable[[], bool] = lambda: False,
    seal: Callable[[bytes], bytes] = plain_hash,
) -> int:
    """Write an entry into an empty file. about: name, kind, seconds and stamps. Raises OSError, and Stopped.

    Returns the bytes of the file.
    """
    _write_all(file, memoryview(MAGIC))
    digest = hashlib.blake2b(digest_size=32)
    table = []
    for tensor in found.tensors:
        table.append([str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        on_cpu = tensor.detach().cpu().contiguous()
        data = _bytes_of(on_cpu)
        for start in range(0, len(data), CHUNK):
            if stop():
                raise Stopped
            chunk = data[start : start + CHUNK]
            digest.update(chunk)
            _write_all(file, chunk)
    record = {**about, "tree": found.tree, "tensors": table, "data": digest.hexdigest()}
    text = json.dumps(record).encode()
    if len(text) > MAX_JSON_BYTES:
        raise NotStorable
    _write_all(file, memoryview(text))
    _write_all(file, memoryview(TRAILER.pack(len(text), seal(text))))
    return len(MAGIC) + found.nbytes + len(text) + TRAILER.size


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while data:  # an unbuffered file may take less than it is given
        data = data[file.write(data) :]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Show the memory of a contiguous tensor on the CPU as bytes, for as long as the tensor is held.

    numpy would do so too, and its storage could not be emptied any more: see `Grip`.
    """
    size = _nbytes(tensor)
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# -- reading


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a plain file. Raises ValueError for anything else, as opening a pipe would wait for ever."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise ValueError("it is no plain file")
    with open(path, "rb", buffering=0) as file:
        yield file  # type: ignore[misc]


def read_record(file: BinaryIO, name: str, seal: Callable[[bytes], bytes] = plain_hash) -> Record:
    """Read what is said about an entry, and check all of it. Raises ValueError, and OSError."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    around = len(MAGIC) + TRAILER.size
    if size < around:
        raise ValueError("it is no entry of this version")
    file.seek(size - TRAILER.size)
    length, wanted = TRAILER.unpack(_read(file, TRAILER.size))
    if length > min(MAX_JSON_BYTES, size - around):
        raise ValueError("its end is not as it was written")
    file.seek(size - TRAILER.size - length)
    text = _read(file, length)
    file.seek(0)
    if _read(file, len(MAGIC)) != MAGIC:
        raise ValueError("it is no entry of this version")
    if not hmac.compare_digest(seal(text), wanted):
        raise ValueError("its JSON was changed, or was sealed with another key")
    try:
        record = _checked(json.loads(text))
    except (RecursionError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"its JSON is not what is written here ({type(error).__name__})") from None
    if record.name != name:
        raise ValueError("it was written under another name")
    if record.nbytes + around + length != size:
        raise ValueError("its tensors have another size")
    return record


def read_outputs(file: BinaryIO, record: Record) -> Any:
    """Read the tensors of a checked record and build the output. Raises ValueError, OSError, and what devices raise."""
    file.seek(len(MAGIC))
    digest = hashlib.blake2b(digest_size=32)
    tensors = []
    for dtype, shape, size in record.tensors:
        tensor = torch.empty(shape, dtype=dtype)
        data = _bytes_of(tensor)
        for start in range(0, size, CHUNK):
            chunk = data[start : start + CHUNK]
            _read_into(file, chunk)
            digest.update(chunk)
        tensors.append(tensor)
    if digest.hexdigest() != record.data:
        raise ValueError("its tensors were changed")
    return _rebuild(record.tree, tensors)


def _read(file: BinaryIO, size: int) -> bytes:
    data = bytearray(size)
    _read_into(file, memoryview(data))
    return bytes(data)


def _read_into(file: BinaryIO, data: memoryview) -> None:
    while data:
        count = file.readinto(data)  # type: ignore[attr-defined]
        if not count:
            raise ValueError("it was cut short")
        data = data[count:]


def _checked(record: Any) -> Record:
    tensors = []
    for dtype, shape in record["tensors"]:
        if len(_list(shape)) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < MAX_INT for n in shape):
            raise ValueError("a shape in it is none")
        kind = DTYPES[dtype]
        size = math.prod(shape) * kind.itemsize
        if size >= MAX_INT or math.prod(max(1, length) for length in shape) >= MAX_INT:
            raise ValueError("a shape in it is too large")
        tensors.append((kind, shape, size))
    seconds = record["seconds"]
    if type(seconds) not in (int, float) or not 0 <= seconds < 1e12:
        raise ValueError("its seconds are none")
    texts = [record[key] for key in ("name", "kind", "data")]
    if not all(type(text) is str for text in texts) or len(tensors) > MAX_ITEMS:
        raise ValueError("a field of it has another type")
    _check_tree(record["tree"], len(tensors))
    return Record(texts[0], texts[1], float(seconds), record["stamps"], record["tree"], tensors, texts[2])


def _check_tree(tree: Any, tensors: int) -> None:
    """Raise ValueError, KeyError or TypeError for a tree that `describe` does not make."""
    pending, items = [(tree, 0)], 0
    while pending:
        node, depth = pending.pop()
        items += 1
        if items > MAX_ITEMS or depth > MAX_DEPTH:
            raise ValueError("its tree is too large")
        if type(node) is not dict:
            raise ValueError("its tree has an item of another type")
        kinds = set(node)
        if kinds == {"tensor", "device"}:
            number = node["tensor"]
            if type(number) is not int or not 0 <= number < tensors or not _is_device(node["device"]):
                raise ValueError("its tree names a tensor that it does not have")
        elif kinds == {"literal"}:
            if type(node["literal"]) not in LITERALS:
                raise ValueError("its tree has an item of another type")
        elif kinds == {"dict"}:
            for key, item in _list(node["dict"]):
                if type(key) is not str:
                    raise ValueError("its tree has a key of another type")
                pending.append((item, depth + 1))
        elif kinds in ({"list"}, {"tuple"}):
            pending += [(item, depth + 1) for item in _list(next(iter(node.values())))]
        else:
            raise ValueError("its tree has an item of an unknown kind")


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError("what should be a list in it is none")
    return value


def _is_device(text: Any) -> bool:
    try:
        return type(text) is str and torch.device(text).type != "meta"
    except RuntimeError:
        return False


def _rebuild(node: Mapping[str, Any], tensors: list[torch.Tensor]) -> Any:
    if "tensor" in node:
        return tensors[node["tensor"]].to(node["device"])
    if "list" in node:
        return [_rebuild(item, tensors) for item in node["list"]]
    if "tuple" in node:
        return tuple(_rebuild(item, tensors) for item in node["tuple"])
    if "dict" in node:
        return {key: _rebuild(item, tensors) for key, item in node["dict"]}
    return node["literal"]
