"""A safetensors file as a source of weights, read through a memory map.

Format: https://github.com/huggingface/safetensors#format. Nothing is read but the header until a tensor is used.
"""

from __future__ import annotations

import mmap
import os
import warnings
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy
import torch

from ..ram.shortage import obtain
from . import lost_pages
from .coming_file import coming_of
from .mapped_file import MappedFile, map_file
from .past_cache import PastCache
from .private_pages import has_private_pages
from .safetensors_header import Header, MissingTensor, SourceError, open_file, parse_header
from .watched_file import WatchedFile

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
# Dtypes of the format that no code here computes with, and the bits of a number. Such tensors are left out.
LEFT_OUT = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
SMALL_BYTES = 1024


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


def _is_left_out(header: Header, key: str) -> bool:
    entry = header.entry(key)
    bits = LEFT_OUT.get(entry.dtype)
    if bits is None:
        return False
    header.check_place(key, entry, entry.numel * bits // 8)
    return True


def tensor_specs(
    header: Header, keep: Callable[[str], bool] | None = None, rename: Callable[[str], str] | None = None
) -> dict[str, TensorSpec]:
    """Return the place of each tensor that is kept, under its new name. Tensors in a dtype of LEFT_OUT are not.

    Raises SourceError for a malformed header.
    """
    keys = [key for key in header.entries if not _is_left_out(header, key)]
    specs = {name: _spec(header, key) for key, name in kept_names(header.path, keys, keep, rename)}
    check_overlap(header.path, specs)
    return specs


def kept_names(
    path: Path,
    keys: Iterable[str],
    keep: Callable[[str], bool] | None = None,
    rename: Callable[[str], str] | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield the keys that are kept with their new names. Raises SourceError where two become one."""
    names: set[str] = set()
    for key in keys:
        if keep is None or keep(key):
            name = key if rename is None else rename(key)
            if name in names:
                raise SourceError(f"{path}: two tensors are named '{name}' after renaming '{key}'.")
            names.add(name)
            yield key, name


def check_overlap(path: Path, specs: dict[str, TensorSpec]) -> None:
    """Raise SourceError where two tensors share bytes of the file."""
    before, end = "", 0
    for key, spec in sorted(specs.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if spec.nbytes and spec.offset < end:
            raise SourceError(
                f"{path}: tensor '{key}' overlaps '{before}'. The file is damaged: download or copy it again."
            )
        before, end = key, spec.offset + spec.nbytes


class DiskMap(Mapping[str, torch.Tensor]):
    """A safetensors file, as a mapping from key to tensor. Its tensors are views of its memory map.

    A write into a tensor stays in this process, and in memory. Pages of a range that was written into are the only
    copy, so they are not dropped. Whoever reads calls `check` first, which raises FileChanged where the file is no
    longer the one that was opened, and waits where it is still coming.

    keep: only these keys (a predicate on the file's key). rename: file key -> key. dtype: floating-point tensors are
    cast on use to this dtype where given (a cast tensor is a copy, not a view). device: where `map[key]` puts a tensor;
    None and the CPU leave it in the map. Raises SourceError for a file that is no whole safetensors file.
    """

    parts: tuple[DiskMap, ...] = ()  # further files, whose tensors the state dict has too
    pickles = False  # whether it opens files that are named as pickles

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        keep: Callable[[str], bool] | None = None,
        rename: Callable[[str], str] | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.path = Path(path)
        self.dtype, self.device = dtype, device
        with open_file(path, pickles=self.pickles) as file:
            coming = coming_of(file)
            watched = WatchedFile(self.path, file.fileno(), coming)  # before the header is read, which is then its
            self.check_unchanged, self.check_often = watched.check, watched.check_often
            self._leave_cache, self._past_cache = watched.leave_cache, PastCache(watched.fd)
            self._specs = self._describe(file, keep, rename)
            self._map, self.read_only = obtain(
                lambda: map_file(file, self.file_bytes), self.file_bytes, f"{path}: mapping this file"
            )
        self.check_unchanged()  # the system maps the file as it is now
        self.check = self._map.check
        self.address = self._view(torch.uint8, self.file_bytes, 0).data_ptr()
        # All tensors of a key share the version counter of the tensor here, so a write into any of them shows.
        self._lent: dict[str, torch.Tensor] = {}
        self._order = sorted((key for key in self._specs if self._specs[key].nbytes), key=self._offset)
        self._offsets = [self._offset(key) for key in self._order]
        self._map.address, self._map.file_bytes = self.address, self.file_bytes
        self._map.check_unchanged, self._map.watched = watched.check, watched
        if coming is not None:
            self._map.coming = coming
            # Small bytes beside weights say how those are to be read, so they are read while the model is built.
            words = [spec for spec in self._specs.values() if spec.dtype == torch.uint8 and spec.nbytes <= SMALL_BYTES]
            coming.expect([(spec.offset, spec.nbytes) for spec in words], soon=True)
        _mapped_files.add(self._map)
        lost_pages.install(lambda: _mapped_files)
        _open_maps.add(self)

    def _describe(
        self, file: BinaryIO, keep: Callable[[str], bool] | None, rename: Callable[[str], str] | None
    ) -> dict[str, TensorSpec]:
        """Read the header. Return the place of each tensor."""
        header = parse_header(self.path, file)
        self.file_bytes, self.metadata = header.file_bytes, header.metadata
        self.left_out = [key for key in header.entries if _is_left_out(header, key)]
        return tensor_specs(header, keep, rename)

    def _offset(self, key: str) -> int:
        return self._specs[key].offset

    @property
    def files(self) -> tuple[DiskMap, ...]:
        """The maps that the state dict's tensors lie in."""
        return (self, *self.parts)

    # Two maps are never equal. They stand in sets, and comparing their tensors would read both files.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, key: str) -> torch.Tensor:
        """Return a tensor on the device. Raises MissingTensor, and FileChanged where the file has changed."""
        spec = self.spec(key)
        self.check(spec.offset, spec.nbytes)
        tensor = self.tensor(key)
        return tensor if self.device is None else tensor.to(self.device)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys, in file order."""
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __contains__(self, key: object) -> bool:
        return key in self._specs

    def spec(self, key: str) -> TensorSpec:
        """Return dtype, shape and place of a tensor. Raises MissingTensor for a key that is not there."""
        try:
            return self._specs[key]
        except KeyError:
            some = ", ".join(list(self._specs)[:3])
            raise MissingTensor(
                f"{self.path}: no tensor '{key}'. The file has {len(self._specs)}, such as {some}."
            ) from None

    def tensor(self, key: str) -> torch.Tensor:
        """Return the tensor as a view of the map. Nothing is read until its elements are."""
        spec = self.spec(key)
        if not spec.nbytes:
            view = torch.empty(spec.shape, dtype=spec.dtype)
        else:
            view = self._lend(key, spec).view(spec.shape)
        if self.dtype is None or not spec.dtype.is_floating_point:
            return view
        self.check(spec.offset, spec.nbytes)
        return view.to(self.dtype)

    def _lend(self, key: str, spec: TensorSpec) -> torch.Tensor:
        lent = self._lent.get(key)
        if lent is None:
            lent = self._view(spec.dtype, spec.nbytes // spec.dtype.itemsize, spec.offset)
            lent = self._lent.setdefault(key, lent)  # that of another thread, if it came first
        return lent

    def _view(self, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
        # Tensors of inference mode do not count writes, and pages with written numbers would be dropped.
        with torch.inference_mode(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all tensors as views of the map."""
        return {key: self.tensor(key) for key in self._specs}

    def written(self, offset: int, nbytes: int) -> bool:
        """Say whether torch has written into a tensor in this range of bytes, which then differs from the file."""
        first = max(0, bisect_right(self._offsets, offset) - 1)
        for key in self._order[first : bisect_left(self._offsets, offset + nbytes)]:
            lent = self._lent.get(key)
            if lent is not None and lent._version:
                return True
        return False

    def drop(self, offset: int, nbytes: int, from_cache: bool = False) -> None:
        """Give the whole pages of a range of bytes back to the system. A later read brings them again.

        from_cache: the page cache need not keep them for that read, which is not to be expected.

        A range that was written into stays. Writes that torch does not count (through `.data`, numpy or an address)
        are seen where the kernel tells of them, which Linux does.
        """
        option = getattr(mmap, "MADV_DONTNEED", None)
        if option is None:  # Windows: the system trims working sets by itself
            return
        page = mmap.PAGESIZE
        start, end = -(-offset // page) * page, (offset + nbytes) // page * page
        if end <= start or self.written(offset, nbytes) or has_private_pages(self.address + start, end - start):
            return
        self._map.madvise(option, start, end - start)
        if from_cache:
            self._leave_cache(start, end - start)

    def read_past_cache(self, target: numpy.ndarray, offset: int) -> bool:
        """Read a range of bytes so that the page cache does not keep them.

        Return False where the map is to be read: of a range that was written into, or has yet to come, or where the
        system knows no such reads. target: uint8, as long as the range.
        """
        page, nbytes = mmap.PAGESIZE, len(target)
        start, end = offset // page * page, -(-(offset + nbytes) // page) * page
        if self._map.coming is not None or self.written(offset, nbytes):
            return False
        if has_private_pages(self.address + start, end - start):
            return False
        return self._past_cache.read(target, offset, numpy.frombuffer(self._map, numpy.uint8, nbytes, offset))

    def will_need(self, offset: int, nbytes: int) -> None:
        """Ask the system to read a range of bytes ahead."""
        option = getattr(mmap, "MADV_WILLNEED", None)
        if option is not None and nbytes > 0:
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(option, start, offset + nbytes - start)


Place = TypeVar("Place", DiskMap, MappedFile)

_open_maps: weakref.WeakSet[DiskMap] = weakref.WeakSet()
# Of tensors that outlive their DiskMap too, as in another pack's merge.
_mapped_files: weakref.WeakSet[MappedFile] = weakref.WeakSet()


def map_of(tensor: torch.Tensor) -> DiskMap | None:
    """Return the map that the elements of a strided tensor lie in; None for ordinary memory."""
    return _holder(tensor, _open_maps)


def mapped_file(tensor: torch.Tensor) -> MappedFile | None:
    """Return the mapped file that the elements of a strided tensor lie in; None for ordinary memory."""
    return _holder(tensor, _mapped_files)


def _holder(tensor: torch.Tensor, places: Iterable[Place]) -> Place | None:
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return None
    address = tensor.data_ptr()
    return next((place for place in places if 0 <= address - place.address < place.file_bytes), None)


def locate(tensor: torch.Tensor) -> tuple[DiskMap, int, int] | None:
    """Return the map, offset and bytes that a contiguous tensor is a view of, or None for ordinary memory."""
    disk_map = map_of(tensor)
    if disk_map is None or not tensor.is_contiguous():
        return None
    return disk_map, tensor.data_ptr() - disk_map.address, tensor.numel() * tensor.element_size()


def read_past_cache(target: numpy.ndarray, tensor: torch.Tensor) -> bool:
    """Read a contiguous tensor's bytes so that the page cache does not keep them. False where the tensor is to be read.

    target: uint8, as long as they are.
    """
    place = locate(tensor)
    return place is not None and place[0].read_past_cache(target, place[1])


def extent(tensor: torch.Tensor) -> tuple[MappedFile, int, int] | None:
    """Return the mapped file that a strided tensor lies in, with the range that holds its elements; None for memory."""
    file = mapped_file(tensor)
    if file is None:
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return file, tensor.data_ptr() - file.address, (last + 1) * tensor.element_size() if tensor.numel() else 0


def check_files(tensors: Iterable[torch.Tensor]) -> None:
    """Raise FileChanged where a file that ordinary tensors lie in has changed since it was opened.

    Wait until all of the tensors have come.
    """
    places = [extent(tensor) for tensor in tensors]
    for file in {place[0] for place in places if place is not None}:
        file.check_unchanged()
    for place in places:
        if place is not None and place[0].coming is not None:
            place[0].check(*place[1:])


def open_maps() -> Iterator[DiskMap]:
    """Yield the maps that are open now, for memory reports."""
    return iter(list(_open_maps))
