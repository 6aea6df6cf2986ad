"""Pictures that can be laid side by side: convolutions that go on at the opposite edge.

The patches are object patches, so a clone without them, and ComfyUI's unpatching, give the plain model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

AXES = {"x": (True, False), "y": (False, True), "x and y": (True, True)}
METHOD = "_conv_forward"


class CircularConvolution:
    """Stands in for the method of a Conv2d that convolves. It holds numbers alone, and no tensor of the model.

    across, down: whether the picture goes on at the opposite edge. Elsewhere it is padded as before, with zeros.
    """

    def __init__(self, conv: torch.nn.Conv2d, across: bool, down: bool) -> None:
        self.rest = conv.stride, (0, 0), conv.dilation, conv.groups
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        self.circular = [left * across, right * across, top * down, bottom * down]
        self.zeros = [left * (not across), right * (not across), top * (not down), bottom * (not down)]

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *_: Any, **__: Any) -> Any:
        x = F.pad(x, self.circular, mode="circular")
        if any(self.zeros):
            x = F.pad(x, self.zeros)
        return F.conv2d(x, weight, bias, *self.rest)


def convolutions(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Conv2d]]:
    """Yield the convolutions of a model that pad with zeros, by name."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.padding_mode == "zeros" and any(module.padding):
            yield name, module


def tiled(patcher: Any, axes: str) -> Any:
    """Clone a patcher whose pictures tile along the axes. Raises ValueError for a model without such convolutions."""
    across, down = AXES[axes]
    clone = patcher.clone()
    found = list(convolutions(patcher.model))
    if not found:
        raise ValueError(
            f"{type(patcher.model).__name__} has no convolution that pads a picture, so it cannot be made to tile. "
            "Seamless tiling takes U-Nets such as SD 1.5 and SDXL as 'model', and their VAEs as 'vae'."
        )
    for name, conv in found:
        clone.add_object_patch(f"{name}.{METHOD}", CircularConvolution(conv, across, down))
    return clone


def give_methods_back(model: torch.nn.Module, names: list[str]) -> None:
    """Remove what ComfyUI's unpatching leaves in the place of methods: bound ones, on each object."""
    for name in names:
        owner, _, attr = name.rpartition(".")
        if attr == METHOD:
            vars(model.get_submodule(owner)).pop(attr, None)
