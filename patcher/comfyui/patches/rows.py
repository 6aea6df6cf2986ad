"""Takes patches apart into patches of some rows, so that a large weight can be patched part by part.

The arithmetic stays ComfyUI's: it is called with rows of the weight and rows of what the patch adds. A patch can be
taken apart only if every row of its result depends on that row alone.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.weight_adapter
import torch

from ....ops.gather import is_wrapper
from .weight_patch import WeightPatch

# ComfyUI rounds to these with random numbers that it draws for the whole weight at once.
ROUNDED_AT_RANDOM = (torch.float8_e4m3fn, torch.float8_e5m2)

Rows = slice | torch.Tensor


class TablePatch(WeightPatch):
    """Patches the weight of an embedding, or some rows of it. final: what the patched weight looks like."""

    def __init__(self, patch: WeightPatch, final: torch.Tensor) -> None:
        self.__dict__.update(patch.__dict__)
        self.final = final

    def of_rows(self, which: torch.Tensor) -> WeightPatch | None:
        """Make the patch of any rows, with the bits that they have in the whole. None where it needs the whole.

        That of a LoRA does. How a device rounds a product may depend on its size.
        """
        return _part(self, self.final, which)


def rows_of(patch: WeightPatch, weight: torch.Tensor, start: int, stop: int) -> WeightPatch | None:
    """Make the patch for rows of a weight in the model's dtype. None where it needs the whole weight."""
    return _part(patch, weight, slice(start, stop))


def _part(patch: WeightPatch, weight: torch.Tensor, which: Rows) -> WeightPatch | None:
    if is_wrapper(weight) or weight.dtype in ROUNDED_AT_RANDOM or patch.hooked or patch.shape != weight.shape:
        return None
    patches = _rows(patch.patches, tuple(weight.shape), which)
    if patches is None:
        return None
    part = copy.copy(patch)
    part.patches = patches
    return part


def tensors_read(patches: list[tuple]) -> list[torch.Tensor]:
    """List the weights of other models that patches read."""
    tensors = []
    for _, value, *_ in patches:
        if isinstance(value, list):
            (weight, _), *nested = value
            tensors += [weight, *tensors_read(nested)]
        elif isinstance(value, tuple) and value[0] == "model_as_lora":
            tensors.append(value[1][0])
    return tensors


def _rows(patches: list[tuple], shape: tuple[int, ...], which: Rows) -> list[tuple] | None:
    parts = []
    for strength, value, strength_model, offset, function in patches:
        if function is not None:
            return None
        rows, place, size = which, offset, shape
        if offset is not None:
            if not isinstance(which, slice):
                return None
            start, stop = which.start, which.stop
            # (dimension, first, length): the patch is for these rows of the weight only.
            dimension, begin, length = offset
            if dimension != 0:
                return None
            first, last = max(start, begin) - begin, min(stop, begin + length) - begin
            if last <= first:
                continue
            place = (0, begin + first - start, last - first)
            rows, size = slice(first, last), (length, *shape[1:])
        part = _value_rows(value, size, rows)
        if part is None:
            return None
        parts.append((strength, part, strength_model, place, None))
    return parts


def _value_rows(value: Any, shape: tuple[int, ...], which: Rows) -> Any:
    """Take the rows of what one patch adds to a weight of `shape`. None where it cannot be taken apart."""
    if isinstance(value, list):  # another model's weight, and the patches that it has
        (weight, convert), *patches = value
        if is_wrapper(weight) or tuple(weight.shape) != shape:
            return None
        rows = _rows(patches, shape, which)
        return None if rows is None else [(weight[which], convert), *rows]
    if isinstance(value, comfy.weight_adapter.LoRAAdapter):
        up, _, _, _, dora_scale, reshape = value.weights
        if dora_scale is not None or reshape is not None or up.shape[0] != shape[0] or not isinstance(which, slice):
            return None
        return type(value)(value.loaded_keys, (up[which], *value.weights[1:]))
    if isinstance(value, tuple) and len(value) == 1:
        value = ("diff", value)
    if isinstance(value, tuple) and value[0] in ("diff", "set") and tuple(value[1][0].shape) == shape:
        return (value[0], (value[1][0][which], *value[1][1:]))
    return None
