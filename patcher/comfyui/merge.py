"""Merges models as patches. The weights of the others are read where they lie, when a merged weight is made."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ...ops.gather import is_wrapper
from .model_state import model_dtype, source_of
from .patches.weight_patch import rounded

log = logging.getLogger("spillway")

ROOT = "diffusion_model."
GROUPS = ("early", "middle", "late", "other")
# The three parts of a U-Net have names.
NAMED_GROUPS = {"input_blocks": "early", "middle_block": "middle", "output_blocks": "late"}


def _smooth(share: float) -> float:
    """Give the share of a sigmoid-like curve: flat at both ends."""
    return share * share * (3.0 - 2.0 * share)


def _steep(share: float) -> float:
    """Give the share of the inverse of `_smooth`: steep at both ends."""
    return 0.5 - math.sin(math.asin(1.0 - 2.0 * share) / 3.0)


# How a share becomes that of the interpolation.
CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "sigmoid": _smooth,
    "inverse sigmoid": _steep,
}


def block_of_keys(blocks: Iterable[str]) -> Callable[[str], str]:
    """Make a function from the key of a weight to its block, the longest name that it begins with; '' for none."""
    longest_first = sorted(blocks, key=len, reverse=True)

    def block_of(key: str) -> str:
        return next((block for block in longest_first if key.startswith(f"{block}.")), "")

    return block_of


def group_of_keys(root: torch.nn.Module) -> Callable[[str], str]:
    """Make a function from the key of a weight in a diffusion model to its group, one of GROUPS.

    A U-Net has input, middle and output blocks. Of other models the repeated blocks are divided into thirds, in their
    order. Everything else is 'other'.
    """
    blocks: dict[str, str] = {}
    if all(hasattr(root, name) for name in NAMED_GROUPS):
        blocks = {f"{name}.": group for name, group in NAMED_GROUPS.items()}
    else:
        lists = [(name, part) for name, part in root.named_children() if isinstance(part, torch.nn.ModuleList)]
        names = [f"{name}.{index}." for name, part in lists for index in range(len(part))]
        blocks = {name: GROUPS[place * 3 // len(names)] for place, name in enumerate(names)}

    def group_of(key: str) -> str:
        return next((group for begin, group in blocks.items() if key.startswith(begin)), "other")

    return group_of


def _unwrapped(weight: torch.Tensor, **_: Any) -> torch.Tensor:
    """Give a weight without its quantisation. ComfyUI's merging calls this."""
    return weight.dequantize() if is_wrapper(weight) else weight  # type: ignore[operator]


def key_patches(patcher: Any) -> dict[str, list[Any]]:
    """Make a model's floating-point weights patches for another: [(weight, its conversion), own patches...].

    Each is as it is in the model's dtype, whatever the file has.
    """
    patches = {}
    for name, parameter in patcher.model.diffusion_model.named_parameters():
        key = f"{ROOT}{name}"
        if parameter.dtype.is_floating_point and not name.endswith("_scale"):
            weight = source_of(patcher, key, parameter)
            owner, _, attr = key.rpartition(".")
            dtype = model_dtype(patcher.model.get_submodule(owner), attr, weight)
            cast = dtype != weight.dtype and weight.is_floating_point() and not is_wrapper(weight)
            patches[key] = [(weight, rounded(dtype) if cast else _unwrapped), *patcher.patches.get(key, [])]
    return patches


def _common(model: Any, other: Any) -> dict[str, list[Any]]:
    """Find the weights of `other` that `model` has too. Raises ValueError for models of two architectures."""
    shapes = {f"{ROOT}{name}": tuple(p.shape) for name, p in model.model.diffusion_model.named_parameters()}
    theirs = key_patches(other)
    names = f"{type(model.model).__name__} and {type(other.model).__name__}"
    common = {key: patches for key, patches in theirs.items() if key in shapes}
    for key, ((weight, _), *_) in common.items():
        if tuple(weight.shape) != shapes[key]:
            raise ValueError(
                f"'{key}' is {shapes[key]} in one model and {tuple(weight.shape)} in the other ({names}). Only models "
                "of one architecture and size can be merged."
            )
    if 2 * len(common) < max(len(shapes), len(theirs)):
        raise ValueError(f"{names} share {len(common)} weights of {len(shapes)}: they are of two architectures.")
    left = len(shapes) - sum(key in common for key in shapes)
    if left:
        log.info("[Spillway] %d weights that only the first model has are left as they are", left)
    return common


def merge(
    models: list[Any],
    shares: Mapping[str, float],
    share3: float = 0.0,
    *,
    add_difference: bool = False,
    group: Callable[[str], str] | None = None,
) -> Any:
    """Clone the first MODEL and merge one or two others into the clone. Nothing is computed until a weight is needed.

    shares: the second model's share of each group. group: from the key of a weight to its group, by default one of
    GROUPS. A weighted sum is (1 - share - share3) of the first, share of
    the second and share3 of the third; with add_difference it is the first and share times what the second has over
    the third. Raises ValueError for models of two architectures.
    """
    first, second, *rest = models
    if add_difference and not rest:
        raise ValueError("add difference needs three models: to the first is added what the second has over the third.")
    group = group or group_of_keys(first.model.diffusion_model)
    patches2 = _common(first, second)
    patches3 = _common(first, rest[0]) if rest else {}
    # (strength of the patch, strength of what stands there) -> patches. They go in together by strength, as ComfyUI
    # lists all weights at each call of add_patches.
    steps: dict[tuple[float, float], dict[str, list[Any]]] = {}
    for key, patches in patches2.items():
        share = shares[group(key.removeprefix(ROOT))]
        if add_difference:
            if share and key in patches3:
                steps.setdefault((share, 1.0), {})[key] = patches
                steps.setdefault((-share, 1.0), {})[key] = patches3[key]
            continue
        third = share3 if key in patches3 else 0.0
        if share or third:
            steps.setdefault((share, 1.0 - share - third), {})[key] = patches
        if third:
            steps.setdefault((third, 1.0), {})[key] = patches3[key]
    merged = first.clone()
    for (strength, strength_model), patches in sorted(steps.items(), key=lambda step: step[0][1]):
        merged.add_patches(patches, strength, strength_model)
    # Their files stay mapped, and known as maps, as long as the merge is used.
    merged.set_attachments("spillway_merged", [*(merged.get_attachment("spillway_merged") or []), second, *rest])
    return merged
