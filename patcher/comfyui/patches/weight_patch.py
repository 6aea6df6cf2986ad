"""Makes functions of ComfyUI's patches, which the engine applies once to each weight."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.model_patcher import LowVramPatch, get_key_weight
from comfy.weight_adapter import WeightAdapterBase

from ....ops.files.disk_map import mapped_file
from ....ops.gather import copy_into, memory_of
from ....ops.gguf.weight import numbers_of, stays_quantised
from .in_pieces import write_in_pieces
from .plain_lora import calculate_weight
from .requantise import requantiser


class WeightPatch:
    """Turns a weight in the model's dtype into the patched weight in the same dtype.

    The arithmetic is ComfyUI's own, rounded by a seed of the key. patches, hooked: lists of ComfyUI's patch tuples.
    LoRAs are rounded before hooks come on top, as with the classic patcher. weight: the unpatched weight as it is
    stored, for patches that need it in the model's `dtype` (a model used as a LoRA). rounded: False leaves the result
    in the dtype of the computation.
    """

    def __init__(
        self,
        model: Any,
        key: str,
        weight: torch.Tensor,
        dtype: torch.dtype,
        patches: list[tuple],
        hooked: list[tuple],
        *,
        rounded: bool = True,
    ) -> None:
        self.rounded = rounded
        self.key = key
        self.dtype = dtype
        self.patches, self.hooked = list(patches), list(hooked)
        _, self.requantise, self.dequantise = get_key_weight(model, key)
        self.weight = weight
        self.shape = comfy.lora.calculate_shape(self.all_patches, weight, key)
        # Of large LoRAs, and of other models whose weights are merged in.
        self.maps = {mapped_file(tensor) for tensor in tensors_of(self.all_patches)} - {None}

    @property
    def all_patches(self) -> list[tuple]:
        """The patches in the order in which they are applied."""
        return self.patches + self.hooked

    def __call__(self, weight: torch.Tensor, *, in_place: bool = True) -> torch.Tensor:
        """Patch a weight. in_place: the weight given may be overwritten, as the engine allows.

        Raises FileChanged where a file that the patches are read from has changed.
        """
        self.check_files()
        if self.patches:
            compute_dtype = comfy.model_management.lora_compute_dtype(weight.device)
            weight = self._apply(self.patches, weight, compute_dtype, copy=not in_place)
            in_place = True
        if self.hooked:
            weight = self._apply(self.hooked, weight, torch.float32, copy=not in_place)
        return weight

    def write(self, out: torch.Tensor, weight: torch.Tensor) -> bool:
        """Write the patched weight to `out`, in less memory than calling this takes -> whether that could be done.

        out: in the dtype that the op computes in. weight: as it is stored. Raises FileChanged as calling does.
        """
        if not self.rounded or comfy.model_management.lora_compute_dtype(out.device) != torch.float32:
            return False
        self.check_files()
        stages = [patches for patches in (self.patches, self.hooked) if patches]
        if self.dequantise is None and self.requantise is None:
            return write_in_pieces(out, weight, stages)
        if len(stages) != 1 or getattr(self.requantise, "__module__", None) != comfy.ops.__name__:
            return False
        found = requantiser(out, weight)
        if found is None:
            return False
        value = calculate_weight(stages[0], found.dequantise(), self.key, self._originals(stages[0]))
        seed = comfy.utils.string_to_seed(self.key)
        if value.dtype == torch.float32:
            found.write(value.contiguous(), seed)
        else:  # of another pack's adapter
            copy_into(out, self.requantise(value, inplace_update=False, seed=seed, return_weight=True))
        return True

    def check_files(self) -> None:
        """Raise FileChanged where a file that the patches are read from has changed since it was opened."""
        for disk_map in self.maps:
            disk_map.check()  # type: ignore[union-attr]

    def _apply(
        self, patches: list[tuple], weight: torch.Tensor, compute_dtype: torch.dtype, *, copy: bool
    ) -> torch.Tensor:
        value = comfy.model_management.cast_to_device(weight, weight.device, compute_dtype, copy=copy)
        if self.dequantise is not None:
            value = self.dequantise(value, inplace=True)
        value = calculate_weight(patches, value, self.key, self._originals(patches))
        if not self.rounded:
            return value
        seed = comfy.utils.string_to_seed(self.key)
        if self.requantise is None:
            return comfy.float.stochastic_rounding(value, weight.dtype, seed=seed)
        return self.requantise(value, inplace_update=False, seed=seed, return_weight=True)

    def _originals(self, patches: list[tuple]) -> dict[str, list[tuple]] | None:
        """Give the unpatched weight as ComfyUI's own patcher has it, for the one form of patch that asks."""
        if not any(isinstance(patch[1], tuple) and patch[1][0] == "model_as_lora" for patch in patches):
            return None
        weight = self.weight if stays_quantised(self.weight) else numbers_of(self.weight).to(self.dtype)
        return {self.key: [(weight, _unchanged)]}

    def same_as(self, other: Any) -> bool:
        """Whether two patches give the same weight. They do with the same tensors in the same order."""
        return type(other) is type(self) and _same(self.patches, other.patches) and _same(self.hooked, other.hooked)


def tensors_of(patch: Any) -> Iterator[torch.Tensor]:
    """Yield the ordinary tensors of a patch, or of a list of patches."""
    if torch.is_tensor(patch):
        yield from memory_of(patch)
    elif isinstance(patch, WeightAdapterBase):
        yield from tensors_of(patch.weights)
    elif isinstance(patch, (tuple, list)):
        for part in patch:
            yield from tensors_of(part)


def _unchanged(weight: torch.Tensor, **_: Any) -> torch.Tensor:
    return weight


@functools.lru_cache
@functools.cache  # the same function each time, or patches that hold it would not be the same
def rounded(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Make a merge patch's conversion, which rounds another model's weight to the dtype that it computes in."""
    return lambda weight, **_: weight.to(dtype).to(weight.dtype)


def _same(one: Any, other: Any) -> bool:
    """Whether two patches, or parts of them, hold the same tensors and numbers."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, WeightAdapterBase):  # ComfyUI makes a new one each time that it reads a LoRA's tensors
        return _same(one.weights, other.weights)
    return isinstance(one, (int, float, str, types.MethodType)) and one == other


def idle_function(key: str, patches: dict[str, list[tuple]]) -> Any:
    """Make ComfyUI's own per-use patch, for code that casts an idle weight without calling its module."""
    return LowVramPatch(key, patches)
