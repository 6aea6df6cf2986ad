"""Tensors that are computed when they are written, one after the other, and in parts where possible.

Code that names, joins or transposes the tensors of a state dict works on them as on any others. Its operations are
noted, and carried out when the result is written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.overrides import TorchFunctionMode

from ..gather import memory_of
from ..joined_weight import JoinedWeight
from .disk_map import check_files, locate

# Bytes of a part in float32, the widest dtype of the computations.
PART_BYTES = 4 << 20
# Matrix products of very few rows may take other kernels, and the result would differ in its last bits.
MIN_ROWS = 32


@dataclass(frozen=True)
class Part:
    """Rows of a tensor, from `start` on: contiguous CPU memory. `name`: which of the recipe's tensors."""

    name: str
    start: int
    data: torch.Tensor


class Recipe:
    """Computes one tensor, or several together."""

    def parts(self) -> Iterator[Part]:
        """Yield the tensors, part by part. Each call computes them anew, with the same bits."""
        raise NotImplementedError

    def sources(self) -> list[torch.Tensor]:
        """Return the tensors that are read, for reading ahead and for giving pages back."""
        return []


class Stored(Recipe):
    """A tensor that exists already, cast to `dtype` where given."""

    def __init__(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        self.tensor = tensor
        self.dtype = tensor.dtype if dtype is None else dtype

    def parts(self) -> Iterator[Part]:
        tensor = self.tensor.detach()
        for start, stop in row_ranges(tuple(tensor.shape)):
            check_files(memory_of(tensor))
            rows = tensor[start:stop] if tensor.dim() else tensor
            rows = rows.whole() if isinstance(rows, JoinedWeight) else rows
            yield Part("", start, rows.to(device="cpu", dtype=self.dtype).contiguous())

    def sources(self) -> list[torch.Tensor]:
        return [self.tensor]


class Made(Recipe):
    """One tensor that a function returns whole."""

    def __init__(self, make: Callable[[], torch.Tensor], sources: list[torch.Tensor] | None = None) -> None:
        self.make, self._sources = make, sources or []

    def parts(self) -> Iterator[Part]:
        yield Part("", 0, self.make().detach().to("cpu").contiguous())

    def sources(self) -> list[torch.Tensor]:
        return self._sources


def row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of rows, about PART_BYTES and at least MIN_ROWS each; the same on every machine."""
    rows = shape[0] if shape else 1
    row_bytes = 4
    for size in shape[1:]:
        row_bytes *= size
    count = max(1, min(-(-rows * row_bytes // PART_BYTES), rows // MIN_ROWS))
    edges = [rows * index // count for index in range(count + 1)]
    return itertools.pairwise(edges)


class Deferred(torch.Tensor):
    """A tensor without data, with shape and dtype. `recipe` computes it, under the name `part` among its tensors."""

    recipe: Recipe
    part: str

    @staticmethod
    def of(recipe: Recipe, shape: tuple[int, ...], dtype: torch.dtype, part: str = "") -> Deferred:
        """Return a stand-in for a tensor of this shape and dtype."""
        empty = torch.empty(shape, dtype=dtype, device="meta")
        deferred: Deferred = torch.Tensor._make_subclass(Deferred, empty)  # type: ignore[attr-defined]
        deferred.recipe, deferred.part = recipe, part
        return deferred

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor) or result is args[0]:  # a size, or the tensor itself as of contiguous()
            return result
        return Deferred.of(Made(lambda: func(*made(args), **made(kwargs))), tuple(result.shape), result.dtype)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a Deferred tensor has no data that could be copied")


def made(value: Any) -> Any:
    """Return the value with every Deferred in it, or in its lists, tuples and dicts, computed."""
    if isinstance(value, Deferred):
        return whole(value)
    if isinstance(value, (list, tuple)):
        return type(value)(made(item) for item in value)
    if isinstance(value, dict):
        return {key: made(item) for key, item in value.items()}
    return value


def whole(deferred: Deferred) -> torch.Tensor:
    """Compute a Deferred as one tensor in CPU memory."""
    parts = [part.data for part in deferred.recipe.parts() if part.name == deferred.part]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class Assembling(TorchFunctionMode):
    """Inside, a Deferred assigned to part of an empty tensor (`out[a:b] = deferred`) is noted too."""

    def __init__(self) -> None:
        super().__init__()
        self._assigned: dict[int, tuple[torch.Tensor, list[tuple[Any, Deferred]]]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__setitem__ and isinstance(args[2], Deferred):
            target = args[0]
            self._assigned.setdefault(id(target), (target, []))[1].append((args[1], args[2]))
            return None
        return func(*args, **(kwargs or {}))

    def resolve(self, tensor: torch.Tensor) -> Deferred:
        """Return the tensor as a Deferred. Raises ValueError for a meta tensor that no Deferred was assigned to."""
        if isinstance(tensor, Deferred):
            return tensor
        shape, dtype = tuple(tensor.shape), tensor.dtype
        if not tensor.is_meta:
            return Deferred.of(Stored(tensor), shape, dtype)
        if id(tensor) not in self._assigned:
            raise ValueError(f"a tensor of {tuple(shape)} {dtype} has no data")
        assigned = self._assigned[id(tensor)][1]

        def assemble() -> torch.Tensor:
            result = torch.zeros(shape, dtype=dtype)
            for place, deferred in assigned:
                result[place] = whole(deferred)
            return result

        return Deferred.of(Made(assemble), shape, dtype)


def drop_pages(tensor: torch.Tensor) -> None:
    """Give the pages behind a tensor back to the system, where the tensor lies in a file's map."""
    location = locate(tensor)
    if location is not None:
        disk_map, offset, nbytes = location
        disk_map.drop(offset, nbytes)


def read_ahead(tensor: torch.Tensor) -> None:
    """Ask the system to read a tensor that lies in a file's map."""
    location = locate(tensor)
    if location is not None:
        disk_map, offset, nbytes = location
        disk_map.will_need(offset, nbytes)
