"""A safetensors file as a source of weights, read through a memory map.

Format: https://github.com/huggingface/safetensors#format. Nothing is read but the header until a tensor is used.
"""

from __future__ import annotations

import mmap
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from .safetensors_header import Header, SourceError, open_file, parse_header

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
for _name, _attribute in {
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}.items():
    if hasattr(torch, _attribute):
        DTYPES[_name] = getattr(torch, _attribute)


@dataclass(frozen=True)
class TensorSpec:
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


def _spec(header: Header, key: str) -> TensorSpec:
    entry = header.entry(key)
    if entry.dtype not in DTYPES:
        raise SourceError(
            f"{header.path}: tensor '{key}' has dtype {entry.dtype}, which this torch ({torch.__version__}) cannot "
            f"hold. Known: {', '.join(DTYPES)}. Convert the file or update torch."
        )
    dtype = DTYPES[entry.dtype]
    nbytes = entry.numel * dtype.itemsize
    header.check_place(key, entry, nbytes)
    return TensorSpec(dtype, entry.shape, header.base + entry.start, nbytes)


def _check_overlap(path: Path, specs: dict[str, TensorSpec]) -> None:
    before, end = "", 0
    for key, spec in sorted(specs.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if spec.nbytes and spec.offset < end:
            raise SourceError(
                f"{path}: tensor '{key}' overlaps '{before}'. The file is damaged: download or copy it again."
            )
        before, end = key, spec.offset + spec.nbytes


def _map(file: BinaryIO) -> mmap.mmap:
    """Map a whole file, however large.

    A private writable map keeps a stray write in this process and off the file. But the system reserves memory for all
    of it unless told not to, which a model larger than RAM would fail; where it cannot be told, the map is read-only.
    """
    if sys.platform != "win32":
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0x40)
        try:
            return mmap.mmap(
                file.fileno(), 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        except OSError:  # a system that never overcommits
            pass
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class DiskMap:
    """A safetensors file; tensors are views of its memory map.

    keep: only these keys (a predicate on the file's key). rename: file key -> key. dtype: floating-point tensors are
    cast on use to this dtype where given (a cast tensor is a copy, not a view). Raises SourceError for anything that
    is no whole safetensors file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        keep: Callable[[str], bool] | None = None,
        rename: Callable[[str], str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.path = Path(path)
        self.dtype = dtype
        with open_file(path) as file:
            header = parse_header(self.path, file)
            self.file_bytes = header.file_bytes
            self.metadata = header.metadata
            self._specs: dict[str, TensorSpec] = {}
            for key in header.entries:
                if keep is None or keep(key):
                    name = key if rename is None else rename(key)
                    if name in self._specs:
                        raise SourceError(f"{self.path}: two tensors are named '{name}' after renaming '{key}'.")
                    self._specs[name] = _spec(header, key)
            _check_overlap(self.path, self._specs)
            self._map = _map(file)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.address = self._bytes.data_ptr()
        _open_maps.add(self)

    def keys(self) -> Iterable[str]:
        """The keys, in file order."""
        return self._specs.keys()

    def __contains__(self, key: str) -> bool:
        return key in self._specs

    def spec(self, key: str) -> TensorSpec:
        """Dtype, shape and place of a tensor. Raises SourceError for a key that is not there."""
        try:
            return self._specs[key]
        except KeyError:
            some = ", ".join(list(self._specs)[:3])
            raise SourceError(
                f"{self.path}: no tensor '{key}'. The file has {len(self._specs)}, such as {some}."
            ) from None

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor as a view of the map: nothing is read until its elements are."""
        spec = self.spec(key)
        if not spec.nbytes:
            view = torch.empty(spec.shape, dtype=spec.dtype)
        else:
            count = spec.nbytes // spec.dtype.itemsize
            view = self._view(spec.dtype, count, spec.offset).view(spec.shape)
        return view.to(self.dtype) if self.dtype is not None and spec.dtype.is_floating_point else view

    def _view(self, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors as views of the map."""
        return {key: self.tensor(key) for key in self._specs}

    def drop(self, offset: int, nbytes: int) -> None:
        """Give the whole pages of a range back to the system; a later read brings them again."""
        self._advise("MADV_DONTNEED", offset, nbytes, inward=True)

    def will_need(self, offset: int, nbytes: int) -> None:
        """Ask the system to read a range ahead."""
        self._advise("MADV_WILLNEED", offset, nbytes, inward=False)

    def _advise(self, advice: str, offset: int, nbytes: int, *, inward: bool) -> None:
        option = getattr(mmap, advice, None)
        if option is None:  # Windows: the system trims working sets by itself
            return
        page = mmap.PAGESIZE
        start = -(-offset // page) * page if inward else offset // page * page
        end = (offset + nbytes) // page * page if inward else offset + nbytes
        if end > start:
            self._map.madvise(option, start, end - start)


_open_maps: weakref.WeakSet[DiskMap] = weakref.WeakSet()


def locate(tensor: torch.Tensor) -> tuple[DiskMap, int, int] | None:
    """The map, offset and bytes that a plain contiguous tensor is a view of, or None for ordinary memory."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    address, nbytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    for disk_map in _open_maps:
        offset = address - disk_map.address
        if 0 <= offset and offset + nbytes <= disk_map.file_bytes:
            return disk_map, offset, nbytes
    return None


def open_maps() -> Iterator[DiskMap]:
    """The maps that are open now, for memory reports."""
    return iter(list(_open_maps))
