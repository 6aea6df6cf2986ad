"""Makes recipes for a file of a model's weights in their final form: as the model computes with them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from ....ops.files.deferred import Part, Recipe, drop_pages, row_ranges
from ....ops.files.disk_map import check_files
from ....ops.files.safetensors_writer import SaveError
from ....ops.gather import is_wrapper, memory_of, tensor_bytes
from ....ops.gguf.weight import numbers_of
from ....ops.ram.available import available_ram
from ....ops.subclasses import exact
from ..patches.rows import rows_of, tensors_read
from ..patches.weight_patch import WeightPatch
from ..quantise.layouts import Form
from ..quantise.making import Making, regrouped


class FinalWeight:
    """One weight in its final form: cast to the model's dtype, and patched.

    source: the weight as it is stored. dtype: the one that the model keeps it in. On a CPU the weight is made in parts
    where its patches can be taken apart. On another device it is made as a whole, as when the model runs.
    """

    def __init__(
        self, key: str, source: torch.Tensor, dtype: torch.dtype, patch: WeightPatch | None, device: torch.device
    ) -> None:
        self.key, self.source, self.dtype, self.patch, self.device = key, source.detach(), dtype, patch, device
        self.shape = tuple(patch.shape if patch is not None else source.shape)

    def parts(self, first: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
        """Make (first row, rows) in the model's dtype, from the range on that begins with row `first`.

        Raises FileChanged where a file that is read has changed.
        """
        ranges = [edges for edges in row_ranges(self.shape) if edges[0] >= first]
        if self.device.type == "cpu" and self._can_be_parted():
            for start, stop in ranges:
                self._check_files()
                patch = None if self.patch is None else rows_of(self.patch, self._template(), start, stop)
                stored = self.source[start:stop] if self.shape else self.source
                rows = numbers_of(stored)
                cast = rows.to(self.dtype)
                yield start, cast if patch is None else patch(cast, in_place=cast.dtype != rows.dtype)
                for tensor in (stored, *(tensors_read(patch.patches) if patch is not None else ())):
                    for inner in memory_of(tensor):
                        drop_pages(inner)
            return
        whole = self.whole()
        if is_wrapper(whole):
            whole = whole.dequantize()  # type: ignore[operator]
        for start, stop in ranges:
            yield start, whole[start:stop] if self.shape else whole

    def _check_files(self) -> None:
        check_files(inner for tensor in self.sources() for inner in memory_of(tensor))

    def _can_be_parted(self) -> bool:
        if is_wrapper(self.source):
            return False
        return self.patch is None or bool(
            self.shape and rows_of(self.patch, self._template(), 0, self.shape[0]) is not None
        )

    def _template(self) -> torch.Tensor:
        return torch.empty(self.source.shape, dtype=self.dtype, device="meta")

    def sources(self) -> list[torch.Tensor]:
        """List the tensors that are read to make the weight."""
        return [self.source, *(tensors_read(self.patch.all_patches) if self.patch is not None else ())]

    def whole(self) -> torch.Tensor:
        """Make the weight on the device, quantised if the model keeps it so."""
        self._check_files()
        weight = numbers_of(self.source.to(self.device))
        if not is_wrapper(weight):
            weight = weight.to(self.dtype)
        return weight if self.patch is None else self.patch(weight, in_place=False)


class Cast(Recipe):
    """Casts a weight to a dtype. Raises SaveError where the weight holds numbers that the dtype cannot."""

    def __init__(self, weight: FinalWeight, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype

    def parts(self) -> Iterator[Part]:
        for start, rows in self.weight.parts():
            cast = rows.to(self.dtype)
            if self.dtype is torch.float16 and rows.dtype is not torch.float16:
                self._check_range(rows, cast)
            yield Part("", start, cast.to("cpu").contiguous())

    def _check_range(self, rows: torch.Tensor, cast: torch.Tensor) -> None:
        if bool(torch.isinf(cast).any()) and bool((torch.isinf(cast) & torch.isfinite(rows)).any()):
            raise SaveError(
                f"'{self.weight.key}' holds numbers up to {float(rows.abs().max()):g}; fp16 ends at 65504. "
                "Save as bf16 or as loaded."
            )

    def sources(self) -> list[torch.Tensor]:
        return self.weight.sources()


def as_written(tensor: torch.Tensor) -> torch.Tensor:
    """View scales of MXFP8 as bytes. ComfyUI reads both, but knows no such dtype where it has dynamic VRAM."""
    return tensor.view(torch.uint8) if tensor.dtype is torch.float8_e8m0fnu else tensor


class Requantised(Recipe):
    """Quantises a patched weight as its layer was quantised. Parts are named by suffix."""

    def __init__(self, weight: FinalWeight) -> None:
        self.weight = weight

    def parts(self) -> Iterator[Part]:
        quantised: Any = self.weight.whole()
        for suffix, tensor in quantised.state_dict("").items():
            yield Part(suffix, 0, as_written(tensor).to("cpu").contiguous())

    def sources(self) -> list[torch.Tensor]:
        return self.weight.sources()


class Quantised(Recipe):
    """Quantises a weight in a format of ComfyUI's, as it would be when it is brought. Parts are named by suffix.

    Where something must be known of the whole weight before the first number is rounded, rows computed for that are
    kept while they take no more memory than the stored weight, and half of the RAM that is free. The others are
    computed again.
    """

    def __init__(self, weight: FinalWeight, form: Form) -> None:
        self.weight = FinalWeight(weight.key, weight.source, exact(weight.dtype), weight.patch, weight.device)
        self.form = form

    def parts(self) -> Iterator[Part]:
        making = Making(self.form, self.weight.shape)
        rows = self._looked_at(making) if making.looks else self.weight.parts()
        for start, part in regrouped(rows, making.edges()):
            if not torch.isfinite(part).all():
                raise SaveError(f"'{self.weight.key}' holds infinities or NaN and cannot be quantised. Save as loaded.")
            for suffix, tensor in making.make(part).items():
                yield Part(suffix, start, as_written(tensor).to("cpu").contiguous())
        for suffix, tensor in making.single.items():
            yield Part(suffix, 0, tensor.to("cpu").contiguous())

    def _looked_at(self, making: Making) -> Iterator[tuple[int, torch.Tensor]]:
        kept: deque[tuple[int, torch.Tensor]] = deque()
        rest, room = None, min(tensor_bytes(self.weight.source), available_ram().available // 2)
        for start, rows in self.weight.parts():
            room -= rows.nbytes
            if room >= 0:
                kept.append((start, rows))
            elif rest is None:
                rest = start
            making.look(start, rows)
            del rows
        making.found()
        return itertools.chain(_emptying(kept), iter(()) if rest is None else self.weight.parts(rest))

    def sources(self) -> list[torch.Tensor]:
        return self.weight.sources()


def _emptying(items: deque[Any]) -> Iterator[Any]:
    """Give out the items and forget each, so that its memory goes as soon as it has been written."""
    while items:
        yield items.popleft()
