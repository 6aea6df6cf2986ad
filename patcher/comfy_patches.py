"""The host's patches as functions that the engine applies once to each weight."""

from __future__ import annotations

from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import LowVramPatch, get_key_weight


class HostPatch:
    """Weight in the model's dtype -> patched weight in the same: the host's own arithmetic, rounded by a seed of the key.

    stages: lists of the host's patch tuples; the result of each is rounded before the next, as the classic patcher does for
    LoRAs and then for hooks. Patches that need the unpatched weight (a model used as a LoRA) get the idle one.
    """

    def __init__(self, model: Any, key: str, stages: list[list[tuple]]) -> None:
        self.key = key
        self.stages = [list(stage) for stage in stages if stage]
        weight, self.requantise, self.dequantise = get_key_weight(model, key)
        self.original_weights = {key: [(weight, lambda original, **_: original)]}
        self.shape = weight.shape
        for stage in self.stages:
            self.shape = comfy.lora.calculate_shape(stage, weight, key)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            compute_dtype = comfy.model_management.lora_compute_dtype(weight.device)
            value = comfy.model_management.cast_to_device(weight, weight.device, compute_dtype, copy=True)
            if self.dequantise is not None:
                value = self.dequantise(value, inplace=True)
            value = comfy.lora.calculate_weight(stage, value, self.key, original_weights=self.original_weights)
            seed = comfy.utils.string_to_seed(self.key)
            if self.requantise is None:
                weight = comfy.float.stochastic_rounding(value, weight.dtype, seed=seed)
            else:
                weight = self.requantise(value, inplace_update=False, seed=seed, return_weight=True)
        return weight

    def same_as(self, other: Any) -> bool:
        """Whether two patches give the same weight: the same tuples of the same objects, in the same order."""
        return (
            isinstance(other, HostPatch)
            and len(self.stages) == len(other.stages)
            and all(_same_stage(mine, theirs) for mine, theirs in zip(self.stages, other.stages, strict=True))
        )


def _same_stage(mine: list[tuple], theirs: list[tuple]) -> bool:
    return len(mine) == len(theirs) and all(
        len(a) == len(b)
        and all(x is y or (isinstance(x, (int, float, tuple, str)) and x == y) for x, y in zip(a, b, strict=True))
        for a, b in zip(mine, theirs, strict=True)
    )


def idle_function(key: str, patches: dict[str, list[tuple]]) -> Any:
    """The host's own per-use patch, for code that casts an idle weight without calling its module."""
    return LowVramPatch(key, patches)
