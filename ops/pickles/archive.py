"""The zip archive that torch writes a pickle and its tensors into, checked before anything else reads it."""

from __future__ import annotations

import hashlib
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..files.safetensors_header import AGAIN, MAX_HEADER_BYTES, SourceError

MAGIC = b"PK\x03\x04"
LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # the last two: bytes of the name, and of what follows it
ENCRYPTED = 1


class Archive(NamedTuple):
    """Where each entry's bytes begin -> how many there are. digest: of all names, sizes and checksums."""

    entries: dict[int, int]
    digest: str


def is_archive(file: BinaryIO) -> bool:
    """Say whether a file begins as a zip archive does. Leaves it at its beginning."""
    file.seek(0)
    magic = file.read(len(MAGIC))
    file.seek(0)
    return magic == MAGIC


def check_archive(path: Path, file: BinaryIO, file_bytes: int) -> Archive:
    """Return what lies where. Raises SourceError for what torch.save does not write.

    That is compressed, encrypted or overlapping entries (a small file that unpacks to a huge one), TorchScript, which
    is code, and numbers in another order of bytes.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            return _check_entries(path, file, file_bytes, infos)
    except SourceError:
        raise
    except Exception as error:  # zipfile raises errors of many kinds for a damaged archive
        raise SourceError(f"{path}: its zip archive is damaged ({type(error).__name__}: {error}). {AGAIN}") from None


def _check_entries(path: Path, file: BinaryIO, file_bytes: int, infos: list[zipfile.ZipInfo]) -> Archive:
    names = {info.filename for info in infos}
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        raise SourceError(
            f"{path}: this is a TorchScript archive, which is a program and not only weights. It is not opened. Get "
            "the weights alone, as safetensors."
        )
    if sum(name.split("/")[-1] == "data.pkl" for name in names) != 1 or len(names) != len(infos):
        raise SourceError(
            f"{path}: this zip archive was not written by torch.save: expected one data.pkl and each name once. Unpack "
            "it if it holds models, or get the model as safetensors."
        )
    entries: dict[int, int] = {}
    digest = hashlib.sha256()
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise SourceError(
                f"{path}: entry '{info.filename}' is compressed, and would be {info.file_size} bytes out of "
                f"{info.compress_size}. torch.save compresses nothing, so this may be a zip bomb. It is not opened."
            )
        if info.flag_bits & ENCRYPTED:
            raise SourceError(f"{path}: entry '{info.filename}' is encrypted, which torch.save never does. {AGAIN}")
        entries[_begin(path, file, info)] = info.file_size
        digest.update(f"{info.filename}\0{info.CRC}\0{info.file_size}\0".encode("utf-8", "surrogateescape"))
        _check_small(path, file, info)
    end, before = 0, ""
    for begin, size in sorted(entries.items()):
        if begin < end or begin + size > file_bytes:
            raise SourceError(f"{path}: entries of its zip archive overlap or leave the file{before}. {AGAIN}")
        end, before = begin + size, f" after byte {begin}"
    return Archive(entries, digest.hexdigest())


def _begin(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    fields = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    if fields[0] != MAGIC:
        raise SourceError(f"{path}: entry '{info.filename}' is not where its zip archive says. {AGAIN}")
    return info.header_offset + LOCAL_HEADER.size + int(fields[-2]) + int(fields[-1])


def refuse_zeros(path: Path, pickled: bytes) -> None:
    """Raise SourceError for a pickle that asks for a bytearray: a line makes gigabytes, which torch's reader allows."""
    if b"\nbytearray\n" in pickled:
        raise SourceError(
            f"{path}: this pickle asks to call 'bytearray', which makes memory of any size and no tensor. It was not "
            "read. Get the model as safetensors, from a source that you trust."
        )


def _check_small(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> None:
    name = info.filename.split("/")[-1]
    if name == "data.pkl" and info.file_size > MAX_HEADER_BYTES:
        raise SourceError(
            f"{path}: its data.pkl has {info.file_size} bytes; expected {MAX_HEADER_BYTES} at most, as the numbers "
            "of tensors lie beside it. Get the model as safetensors."
        )
    if name == "data.pkl":
        file.seek(_begin(path, file, info))
        refuse_zeros(path, file.read(info.file_size))
    if name == "byteorder":
        file.seek(_begin(path, file, info))
        if file.read(min(info.file_size, 16)) != b"little":
            raise SourceError(
                f"{path}: its numbers are in the order of bytes of another kind of machine. Save it again on one like "
                "this, or get it as safetensors."
            )
