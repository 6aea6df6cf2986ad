"""Patches of some rows of a weight, so that a large one can be patched part by part.

The host's arithmetic stays the host's: it is called with rows of the weight and rows of what the patch adds. Only
patches of which every row depends on that row alone can be taken apart.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.weight_adapter
import torch

from ....ops.gather import is_wrapper
from .weight_patch import WeightPatch

# Rounded with random numbers that are drawn for the whole weight at once.
ROUNDED_AT_RANDOM = (torch.float8_e4m3fn, torch.float8_e5m2)


def rows_of(patch: WeightPatch, weight: torch.Tensor, start: int, stop: int) -> WeightPatch | None:
    """The patch for `weight[start:stop]`, for a weight in the model's dtype; None where it needs the whole weight."""
    if is_wrapper(weight) or weight.dtype in ROUNDED_AT_RANDOM or patch.hooked or patch.shape != weight.shape:
        return None
    patches = _rows(patch.patches, tuple(weight.shape), start, stop)
    if patches is None:
        return None
    part = copy.copy(patch)
    part.patches = patches
    return part


def tensors_read(patches: list[tuple]) -> list[torch.Tensor]:
    """The weights of other models that patches read."""
    found = []
    for _, value, *_ in patches:
        if isinstance(value, list):
            (weight, _), *nested = value
            found += [weight, *tensors_read(nested)]
        elif isinstance(value, tuple) and value[0] == "model_as_lora":
            found.append(value[1][0])
    return found


def _rows(patches: list[tuple], shape: tuple[int, ...], start: int, stop: int) -> list[tuple] | None:
    found = []
    for strength, value, strength_model, offset, function in patches:
        if function is not None:
            return None
        first, last, place, size = start, stop, offset, shape
        if offset is not None:
            # (dimension, first, length): the patch is for these rows of the weight only.
            dimension, begin, length = offset
            if dimension != 0:
                return None
            first, last = max(start, begin) - begin, min(stop, begin + length) - begin
            if last <= first:
                continue
            place = (0, begin + first - start, last - first)
            size = (length, *shape[1:])
        part = _value_rows(value, size, first, last)
        if part is None:
            return None
        found.append((strength, part, strength_model, place, None))
    return found


def _value_rows(value: Any, shape: tuple[int, ...], start: int, stop: int) -> Any:
    """The rows of what one patch adds to a weight of `shape`; None where it cannot be taken apart."""
    if isinstance(value, list):  # another model's weight, and the patches that it has
        (weight, convert), *patches = value
        if is_wrapper(weight) or tuple(weight.shape) != shape:
            return None
        rows = _rows(patches, shape, start, stop)
        return None if rows is None else [(weight[start:stop], convert), *rows]
    if isinstance(value, comfy.weight_adapter.LoRAAdapter):
        up, _, _, _, dora_scale, reshape = value.weights
        if dora_scale is not None or reshape is not None or up.shape[0] != shape[0]:
            return None
        return type(value)(value.loaded_keys, (up[start:stop], *value.weights[1:]))
    if isinstance(value, tuple) and len(value) == 1:
        value = ("diff", value)
    if isinstance(value, tuple) and value[0] in ("diff", "set") and tuple(value[1][0].shape) == shape:
        return (value[0], (value[1][0][start:stop], *value[1][1:]))
    return None
