"""Chooses among ComfyUI's modules the layers that are quantised, and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from ....ops.gguf.weight import stays_quantised
from ....ops.int8.weight import Int8Rows
from ....ops.quantisation import Quantisation
from ...attach import Quantise
from ...quantised_layers import TEXT_ENCODER, Int8Layers, QuantisedLayers
from .layouts import MULTIPLE, Format
from .weight import KitchenFormat

# ComfyUI knows models of these classes by the widths of such layers. In a file of 4 bits, two numbers of which lie in a
# byte, they would look half as wide, and ComfyUI would not load it.
KNOWN_BY_WIDTH = {
    "AudioDiffusionTransformer": "*transformer.layers.0.self_attn.to_qkv",
    "LTXAVModel": "*transformer_blocks.0.attn2.to_k",
    "LTXVModel": "*transformer_blocks.0.attn2.to_k",
    "StageB": "*down_blocks.1.0.channelwise.0",
    "UNetModel": "*transformer_blocks.0.attn2.to_k",
}


def layout_of(weight: Any) -> str:
    """Name comfy-kitchen's layout of a weight from a quantised file; '' for other weights."""
    return str(getattr(weight, "_layout_cls", ""))


class OwnInt8Layers(Int8Layers):
    """Has layers multiplied by our own INT8 products. Weights in fewer bits stay; those in INT8 are taken over."""

    def __call__(self, module: torch.nn.Module, name: str, weight: torch.Tensor) -> Int8Rows | None:
        if stays_quantised(weight):
            layout = layout_of(weight)
            if "INT8" in layout:
                parameters: Any = weight._params  # type: ignore[attr-defined]
                rotated = getattr(parameters, "convrot", False) or getattr(parameters, "transposed", False)
                # On a CPU comfy-kitchen copies the weight at every use. Elsewhere its own kernels are the best.
                taken = self.device_type == "cpu" and not rotated and weight.dim() == 2
                return Int8Rows() if taken else None
            if "FP8" not in layout:
                return None
        return super().__call__(module, name, weight)


class KitchenLayers(QuantisedLayers):
    """Gives layers a format of ComfyUI's. Weights that have as few bits already stay, but for FP8 that becomes INT8."""

    def __init__(
        self,
        known: Format,
        architecture: str,
        prefix: str = "",
        leave_out: Sequence[str] = (),
        multiplies: bool = False,
    ) -> None:
        super().__init__(architecture, prefix, leave_out, MULTIPLE)
        self.known, self.multiplies = known, multiplies

    def __call__(self, module: torch.nn.Module, name: str, weight: torch.Tensor) -> KitchenFormat | None:
        """Say how a weight is quantised; None for one that keeps its dtype."""
        if stays_quantised(weight):
            layout = layout_of(weight)
            if "FP8" not in layout and "INT8" not in layout:
                return None
            if self.known.bits == 8 and not ("FP8" in layout and self.known.rotated):
                return None
        if weight.dim() != 2 or weight.shape[1] % self.known.columns or not self.take(module, name, weight):
            return None
        return KitchenFormat.of(self.known, weight.shape[1], self.multiplies)

    def covers(self, name: str) -> bool:
        """Say whether a layer of that name stands rounding, and packing."""
        known_by = KNOWN_BY_WIDTH.get(self.architecture, "")
        return super().covers(name) and not (self.known.bits < 8 and fnmatchcase(name, known_by))


def rule_of(model: torch.nn.Module) -> tuple[str, str]:
    """Return the architecture by which a model's sensitive layers are known, and the prefix of their names."""
    root = getattr(model, "diffusion_model", None)
    return (TEXT_ENCODER, "") if root is None else (type(root).__name__, "diffusion_model.")


def chosen(model: torch.nn.Module, layers: Quantise) -> Iterator[tuple[str, torch.Tensor, Quantisation]]:
    """Yield (name, weight, format) of the layers that would be quantised. No engine may lend the weights."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        form = None if weight is None else layers(module, name, weight.detach())
        if weight is not None and form is not None:
            yield name, weight.detach(), form
