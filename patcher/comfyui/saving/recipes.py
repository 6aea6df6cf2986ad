"""A model's weights in the form that it computes with, as recipes for a file."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from comfy.quant_ops import get_layout_class

from ....ops.files.deferred import Part, Recipe, drop_pages, row_ranges
from ....ops.files.safetensors_writer import SaveError
from ....ops.gather import inner_tensors, is_wrapper, tensor_bytes
from ..patches.rows import ROUNDED_AT_RANDOM, rows_of, tensors_read
from ..patches.weight_patch import WeightPatch


class FinishedWeight:
    """One weight as the model computes with it: cast to its dtype, and patched.

    source: as it is stored. form: the dtype that the model keeps it in. On a CPU it is made in parts where its patches
    can be taken apart; on another device as a whole, as when the model runs.
    """

    def __init__(
        self, key: str, source: torch.Tensor, form: torch.dtype, patch: WeightPatch | None, device: torch.device
    ) -> None:
        self.key, self.source, self.form, self.patch, self.device = key, source.detach(), form, patch, device
        self.shape = tuple(patch.shape if patch is not None else source.shape)

    def parts(self, first: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows), in the model's dtype, from the range on that begins with row `first`."""
        ranges = [edges for edges in row_ranges(self.shape) if edges[0] >= first]
        if self.device.type == "cpu" and self._can_be_parted():
            for start, stop in ranges:
                patch = None if self.patch is None else rows_of(self.patch, self._template(), start, stop)
                rows = self.source[start:stop] if self.shape else self.source
                made = rows.to(self.form)
                yield start, made if patch is None else patch(made, in_place=made.dtype != rows.dtype)
                for tensor in (rows, *(tensors_read(patch.patches) if patch is not None else ())):
                    for inner in inner_tensors(tensor):
                        drop_pages(inner)
            return
        whole = self.whole()
        if is_wrapper(whole):
            whole = whole.dequantize()  # type: ignore[operator]
        for start, stop in ranges:
            yield start, whole[start:stop] if self.shape else whole

    def _can_be_parted(self) -> bool:
        if is_wrapper(self.source):
            return False
        return self.patch is None or bool(
            self.shape and rows_of(self.patch, self._template(), 0, self.shape[0]) is not None
        )

    def _template(self) -> torch.Tensor:
        return torch.empty(self.source.shape, dtype=self.form, device="meta")

    def sources(self) -> list[torch.Tensor]:
        """What is read to make it."""
        return [self.source, *(tensors_read(self.patch.all_patches) if self.patch is not None else ())]

    def whole(self) -> torch.Tensor:
        """The weight on the device, quantised if the model keeps it so."""
        weight = self.source.to(self.device)
        if not is_wrapper(weight):
            weight = weight.to(self.form)
        return weight if self.patch is None else self.patch(weight, in_place=False)


class Plain(Recipe):
    """A finished weight in a dtype of its own. Raises SaveError where it holds numbers that the dtype cannot."""

    def __init__(self, weight: FinishedWeight, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype

    def parts(self) -> Iterator[Part]:
        for start, rows in self.weight.parts():
            made = rows.to(self.dtype)
            if self.dtype is torch.float16 and rows.dtype is not torch.float16:
                self._check_range(rows, made)
            yield Part("", start, made.to("cpu").contiguous())

    def _check_range(self, rows: torch.Tensor, made: torch.Tensor) -> None:
        if bool(torch.isinf(made).any()) and bool((torch.isinf(made) & torch.isfinite(rows)).any()):
            raise SaveError(
                f"'{self.weight.key}' holds numbers up to {float(rows.abs().max()):g}; fp16 ends at 65504. "
                "Save as bf16 or as loaded."
            )

    def sources(self) -> list[torch.Tensor]:
        return self.weight.sources()


class Requantised(Recipe):
    """A patched weight of a quantised layer in the quantisation that the layer has; parts are named by suffix."""

    def __init__(self, weight: FinishedWeight) -> None:
        self.weight = weight

    def parts(self) -> Iterator[Part]:
        quantised: Any = self.weight.whole()
        for suffix, tensor in quantised.state_dict("").items():
            yield Part(suffix, 0, tensor.to("cpu").contiguous())

    def sources(self) -> list[torch.Tensor]:
        return self.weight.sources()


class Quantised(Recipe):
    """A finished weight with one scale for all of it, in a layout of the host; parts are named by suffix.

    The scale must be known before the first number is rounded. What is computed for it is kept as far as it takes no
    more memory than the stored weight; the rest is computed again.
    """

    def __init__(self, weight: FinishedWeight, layout: str) -> None:
        self.weight, self.layout = weight, get_layout_class(layout)

    def parts(self) -> Iterator[Part]:
        largest, kept, rest, room = torch.zeros(1, 1), deque(), None, tensor_bytes(self.weight.source)
        for start, rows in self.weight.parts():
            room -= rows.nbytes
            if room >= 0:
                kept.append((start, rows))
            elif rest is None:
                rest = start
            rows = self._computable(rows)
            largest = torch.maximum(largest.to(rows), rows.abs().amax().reshape(1, 1))
            del rows
        if not torch.isfinite(largest).all():
            raise SaveError(f"'{self.weight.key}' holds infinities or NaN and cannot be quantised. Save as loaded.")
        # The scale depends on the largest number only. Of a matrix of zeros it would be zero, and divided by.
        largest = torch.where(largest == 0, torch.ones_like(largest), largest)
        _, params = self.layout.quantize(largest, scale="recalculate")
        again = iter(()) if rest is None else self.weight.parts(rest)
        for start, rows in itertools.chain(_emptying(kept), again):
            made, _ = self.layout.quantize(self._computable(rows), scale=params.scale)
            yield Part("", start, made.to("cpu").contiguous())
        yield Part("_scale", 0, params.scale.to("cpu").contiguous())

    @staticmethod
    def _computable(rows: torch.Tensor) -> torch.Tensor:
        return rows.float() if rows.dtype in ROUNDED_AT_RANDOM else rows

    def sources(self) -> list[torch.Tensor]:
        return self.weight.sources()


def _emptying(items: deque[Any]) -> Iterator[Any]:
    """The items, each forgotten as it is given out."""
    while items:
        yield items.popleft()
