"""Extracts the difference of two models as a LoRA, weight by weight while it is written."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ....ops.files.deferred import Deferred, Part, Recipe
from ....ops.files.save_pipeline import save
from ....ops.gather import memory_of
from ....ops.low_rank import low_rank
from .recipes import FinalWeight
from .save import DTYPES, Saved, final_weights, make_room

log = logging.getLogger("spillway")


def _places(tensor: torch.Tensor) -> list[tuple[int, torch.Size]]:
    """Say where the numbers of a weight lie. A wrapper has no address of its own."""
    return [(part.data_ptr(), part.shape) for part in memory_of(tensor)]


class _Difference:
    """Subtracts what a weight was from what it has become, in float32, on the device that its model runs on."""

    def __init__(self, tuned: FinalWeight, base: FinalWeight) -> None:
        self.tuned, self.base = tuned, base
        self.shape = tuned.shape

    def is_zero(self) -> bool:
        """Whether nothing has changed. Reads no more than it must to know."""
        same_source = self.tuned.source is self.base.source or (
            _places(self.tuned.source) == _places(self.base.source) and self.tuned.dtype == self.base.dtype
        )
        if same_source and self.tuned.patch is None and self.base.patch is None:
            return True
        both = zip(self.tuned.parts(), self.base.parts(), strict=True)
        return all(torch.equal(one.float(), other.to(one.device).float()) for (_, one), (_, other) in both)

    def make(self) -> torch.Tensor:
        result = torch.empty(self.shape, dtype=torch.float32, device=self.tuned.device)
        for start, rows in self.tuned.parts():
            _at(result, start, rows).copy_(rows)
        for start, rows in self.base.parts():
            _at(result, start, rows).sub_(rows.to(result))
        return result

    def sources(self) -> list[torch.Tensor]:
        return self.tuned.sources() + self.base.sources()


def _at(tensor: torch.Tensor, start: int, rows: torch.Tensor) -> torch.Tensor:
    return tensor[start : start + rows.shape[0]] if tensor.dim() else tensor


class _Whole(Recipe):
    """Makes the difference as it is, for weights with too few dimensions for a LoRA."""

    def __init__(self, difference: _Difference, dtype: torch.dtype) -> None:
        self.difference, self.dtype = difference, dtype

    def parts(self) -> Iterator[Part]:
        yield Part("", 0, self.difference.make().to("cpu", self.dtype))

    def sources(self) -> list[torch.Tensor]:
        return self.difference.sources()


class _LowRank(Recipe):
    """Makes the two matrices of a LoRA. Those of convolutions have the shapes that ComfyUI expects."""

    def __init__(self, difference: _Difference, rank: int, dtype: torch.dtype) -> None:
        self.difference, self.rank, self.dtype = difference, rank, dtype

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of up and down."""
        rows, columns, *kernel = self.difference.shape
        flat = columns
        for size in kernel:
            flat *= size
        rank = min(self.rank, rows, flat)
        return (rows, rank, *(1 for _ in kernel)), (rank, columns, *kernel)

    def parts(self) -> Iterator[Part]:
        pair = low_rank(self.difference.make().flatten(start_dim=1), self.rank)
        for name, matrix, shape in zip(("up", "down"), pair, self.shapes(), strict=True):
            yield Part(name, 0, matrix.reshape(shape).to("cpu", self.dtype).contiguous())

    def sources(self) -> list[torch.Tensor]:
        return self.difference.sources()


def pairs_of(model: Any, base: Any) -> dict[str, tuple[FinalWeight, FinalWeight]]:
    """Pair the weights of two diffusion models by key. Raises ValueError unless they have one architecture."""
    ours, theirs = (
        final_weights(patcher, patcher.model.diffusion_model, "diffusion_model.") for patcher in (model, base)
    )
    names = f"{type(model.model).__name__} and {type(base.model).__name__}"
    other = sorted(set(ours) ^ set(theirs))
    if other:
        raise ValueError(f"{names} have other weights, such as '{other[0]}'. Connect models of one architecture.")
    for key, weight in ours.items():
        if weight.shape != theirs[key].shape:
            raise ValueError(
                f"'{key}' is {weight.shape} in one model and {theirs[key].shape} in the other ({names}). Connect "
                "models of one architecture."
            )
    return {key: (weight, theirs[key]) for key, weight in ours.items()}


def save_lora(
    path: str,
    model: Any,
    base: Any,
    rank: int,
    *,
    dtype: str = "fp16",
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    journal: Path | None = None,
) -> Saved:
    """Write a LoRA that turns `base` into `model`, both MODELs with their patches. dtype: bf16, fp16 or fp32.

    Matrices and convolutions that have changed are approximated by `rank`. Biases, norms and the like are written as
    they differ. Raises ValueError for models of other architectures, or without a difference; SaveError.
    """
    begun = time.perf_counter()
    tensors: dict[str, Deferred] = {}
    stored = DTYPES[dtype]
    pairs = pairs_of(model, base)
    for number, (key, (tuned, original)) in enumerate(pairs.items()):
        progress(number, len(pairs))  # the count of bytes is known only once all differences are
        difference = _Difference(tuned, original)
        if difference.is_zero():
            continue
        stem = key.removesuffix(".weight")
        if len(tuned.shape) < 2 or not key.endswith(".weight"):
            name = f"{key.removesuffix('.bias')}.diff_b" if key.endswith(".bias") else f"{stem}.diff"
            tensors[name] = Deferred.of(_Whole(difference, stored), tuned.shape, stored)
            continue
        recipe = _LowRank(difference, rank, stored)
        up, down = recipe.shapes()
        tensors[f"{stem}.lora_up.weight"] = Deferred.of(recipe, up, stored, "up")
        tensors[f"{stem}.lora_down.weight"] = Deferred.of(recipe, down, stored, "down")
    if not tensors:
        raise ValueError("the two models are the same: there is no difference to make a LoRA of.")
    make_room(model.load_device, {key: weight.source for key, (weight, _) in pairs.items()})
    log.info("[Spillway] a LoRA of rank %d: %d tensors of %d weights", rank, len(tensors), len(pairs))
    written = save(path, tensors, metadata, progress=progress, counted=True, journal=journal)
    return Saved(*written, time.perf_counter() - begun)
