"""Quantises a weight in parts, by comfy-kitchen's own functions. Weights that are brought and saved have the same bits.

What holds for a whole weight (its largest number, its codebook) is found first, from all its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from comfy.quant_ops import get_layout_class

from ..patches.rows import ROUNDED_AT_RANDOM
from .layouts import W4A8_GROUP, Form

# Bytes of fp32 rows that are quantised at a time, and fewest rows: scales of blocks lie in tiles of 128.
PART_BYTES, ROWS = 4 << 20, 128
# W4A8 is searched for among 16 levels for each number, which takes many times the memory of the rows.
W4A8_PART_BYTES, W4A8_ROWS = 1 << 19, 32
# Numbers, of rows that are spread evenly, by which comfy-kitchen chooses a codebook. Its own sample is larger, and
# would take half a GB. The choice differs for weights alone that are not normal numbers once they are rotated.
SAMPLED = 1 << 17


class Making:
    """Quantises one weight. First `look` at all rows, then `make` them, part by part; `single` are the tensors that
    belong to no row. Parts begin at rows that `edges` gives.
    """

    def __init__(self, form: Form, shape: tuple[int, ...]) -> None:
        self.form, (self.rows, self.columns) = form, shape
        self.layout: Any = get_layout_class(form.format.layout_name)
        self.algorithm = form.format.algorithm
        self.single: dict[str, torch.Tensor] = {}
        self._largest: torch.Tensor | None = None
        self._sample: list[torch.Tensor] = []
        self._options: dict[str, Any] = {}

    @property
    def looks(self) -> bool:
        """Say whether something must be known of all rows before the first is made."""
        return self.algorithm != "mxfp8" and not (self.algorithm == "int8_tensorwise" and self.form.rotation)

    def edges(self) -> list[int]:
        """Return the rows at which parts begin, and the number of all rows."""
        few = self.algorithm == "asym_w4a8_int8"
        nbytes, rows = (W4A8_PART_BYTES, W4A8_ROWS) if few else (PART_BYTES, ROWS)
        step = max(rows, nbytes // (4 * self.columns) // rows * rows)
        return [*range(0, self.rows, step), self.rows]

    def look(self, start: int, rows: torch.Tensor) -> None:
        """Take note of some rows, of which the first is row `start` of the weight."""
        if self.algorithm == "asym_w4a8_int8":
            wanted = self._sampled_rows().to(rows.device) - start
            self._sample.append(rows[wanted[(wanted >= 0) & (wanted < rows.shape[0])]].float())
            return
        rows = self._computable(rows)
        largest = rows.abs().amax().reshape(1, 1)
        self._largest = largest if self._largest is None else torch.maximum(self._largest.to(rows), largest)

    def found(self) -> torch.Tensor:
        """Settle what was looked for -> a tensor that is finite where all the numbers are."""
        if self.algorithm == "asym_w4a8_int8":
            sample = torch.cat(self._sample)
            self._sample.clear()
            self._options = {"group_size": W4A8_GROUP, "convrot_groupsize": self.form.rotation}
            _, params = self.layout.quantize(sample, **self._options)
            self._options["codebook_tensor"] = self.single["_codebook"] = params.codebook
            return params.s_channel.sum()
        assert self._largest is not None
        # That of a matrix of zeros would give a scale of zero, and divide to NaN.
        largest = torch.where(self._largest == 0, torch.ones_like(self._largest), self._largest)
        _, params = self.layout.quantize(largest, scale="recalculate")
        self._options = {"scale": params.scale}
        self.single["_scale_2" if self.algorithm == "nvfp4" else "_scale"] = params.scale
        return self._largest

    def make(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantise the rows between two edges. Return tensors by suffix, whose rows are those."""
        options = self._options
        if self.form.rotation:
            rows = rows.float()  # a rotation in 16 bits would round once more
            if self.algorithm == "int8_tensorwise":
                options = {"per_channel": True, "convrot": True, "convrot_groupsize": self.form.rotation}
        rows = self._computable(rows)
        with backend_for(self.algorithm, rows):
            numbers, params = self.layout.quantize(rows, **options)
        made = self.layout.state_dict_tensors(numbers, params)
        return {suffix: tensor for suffix, tensor in made.items() if suffix not in self.single}

    def _sampled_rows(self) -> torch.Tensor:
        count = max(1, SAMPLED // self.columns)
        if self.rows <= count:
            return torch.arange(self.rows)
        return torch.linspace(0, self.rows - 1, count).long()

    @staticmethod
    def _computable(rows: torch.Tensor) -> torch.Tensor:
        return rows.float() if rows.dtype in ROUNDED_AT_RANDOM else rows


def backend_for(algorithm: str, rows: torch.Tensor) -> AbstractContextManager[Any]:
    """Choose who quantises the rows, or restores rows of that dtype. Kernels for MXFP8 take 16 bit alone."""
    if algorithm == "mxfp8" and rows.dtype == torch.float32 and rows.device.type == "cuda":
        import comfy_kitchen  # older versions of ComfyUI, which have no MXFP8, come without it

        return comfy_kitchen.use_backend("eager")  # torch's own operations, on the same device
    return nullcontext()


def regrouped(parts: Iterable[tuple[int, torch.Tensor]], edges: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first row, rows) between the edges, of parts that follow each other from row 0 on."""
    waiting: list[torch.Tensor] = []
    begin, held, index = edges[0], 0, 1
    for _, rows in parts:
        waiting.append(rows)
        held += rows.shape[0]
        while index < len(edges) and held >= edges[index] - begin:
            joined = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
            size = edges[index] - begin
            yield begin, joined[:size]
            waiting = [joined[size:]] if held > size else []
            begin, held, index = edges[index], held - size, index + 1
            del joined
