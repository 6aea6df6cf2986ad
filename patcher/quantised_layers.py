"""Chooses the layers of a model that are quantised.

Layers that every token passes through once for each block carry nearly all of the arithmetic, and stand rounding.
Embeddings, modulation, norms and the first and last projections carry little, and their errors spread everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops.int8.linear import group_count
from ..ops.int8.weight import Int8Rows
from .layer_names import VECTOR, has_part

# Parts of a layer's name that keep their dtype in every architecture.
SENSITIVE = (
    *VECTOR,
    "*emb*",
    "*norm*",
    "t_block",
    "img_in",
    "txt_in",
    "final*",
    "head",
    "proj_in",
    "proj_out",
)
TEXT_ENCODER = "text encoder"
# Further such parts, by the class of the diffusion model. Of a text encoder, the towers for other inputs are small.
SENSITIVE_IN: dict[str, tuple[str, ...]] = {
    "Chroma": ("distilled_guidance_layer",),
    "ChromaRadiance": ("distilled_guidance_layer", "nerf*"),
    "HiDreamImageTransformer2DModel": ("gate", "caption_projection"),
    "HunyuanVideo": ("byt5_in", "vision_in"),
    "LTXVModel": ("caption_projection", "patchify_proj"),
    "LTXAVModel": ("caption_projection", "patchify_proj"),
    "NextDiT": ("cap_embedder", "siglip*"),
    "QwenImageTransformer2DModel": ("img_mod", "txt_mod"),
    "UNetModel": ("skip_connection",),
    "WanModel": ("time_projection", "img_emb"),
    TEXT_ENCODER: ("visual", "vision*", "audio*", "multi_modal_projector", "*projection", "lm_head", "shared"),
}
# A layer with fewer inputs or outputs gains nothing.
NARROWEST = 64


class QuantisedLayers:
    """Says which layers stand rounding.

    architecture: the class name of the diffusion model, or TEXT_ENCODER. prefix: what the names of its layers begin
    with. leave_out: more parts of names that keep their dtype, with shell wildcards. multiple: what the rows and
    columns of a weight must be divisible by.
    """

    def __init__(self, architecture: str, prefix: str = "", leave_out: Sequence[str] = (), multiple: int = 8) -> None:
        self.architecture, self.prefix, self.multiple = architecture, prefix, multiple
        self.patterns = (*SENSITIVE, *SENSITIVE_IN.get(architecture, ()), *leave_out)

    def take(self, module: torch.nn.Module, name: str, weight: torch.Tensor) -> bool:
        """Say whether a weight is of a linear layer in a repeated block, wide enough and not sensitive.

        weight: (out, in), as stored.
        """
        if not hasattr(module, "in_features") or weight.dim() != 2 or not weight.is_floating_point():
            return False
        if min(weight.shape) < NARROWEST or any(size % self.multiple for size in weight.shape):
            return False
        return self.covers(name)

    def covers(self, name: str) -> bool:
        """Say whether a layer of that name stands rounding."""
        if not name.startswith(self.prefix):
            return False
        name = name[len(self.prefix) :]
        in_a_block = any(part.isdecimal() for part in name.split(".")[:-1])
        return in_a_block and not has_part(name, self.patterns)


class Int8Layers(QuantisedLayers):
    """Gives these layers INT8 with scales for each row, as the products of a type of device want them."""

    def __init__(self, architecture: str, device_type: str, prefix: str = "", leave_out: Sequence[str] = ()) -> None:
        super().__init__(architecture, prefix, leave_out)
        self.device_type = device_type

    def __call__(self, module: torch.nn.Module, name: str, weight: torch.Tensor) -> Int8Rows | None:
        """Say how a weight is quantised; None for one that keeps its dtype."""
        return Int8Rows(group_count(weight.shape[1], self.device_type)) if self.take(module, name, weight) else None
