"""Chooses the layers of a diffusion model that are kept in INT8.

Layers that every token passes through once for each block carry nearly all of the arithmetic, and stand rounding.
Embeddings, modulation, norms and the first and last projections carry little, and their errors spread everywhere.
"""

from __future__ import annotations

import torch

from ..ops.int8.linear import group_count
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
# Further such parts, by the class of the diffusion model.
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
}
# A layer with fewer inputs or outputs gains nothing.
NARROWEST = 64


class Int8Layers:
    """Gives the number of scales per row of a layer's weight in INT8, 0 for layers that keep their dtype.

    architecture: the class name of the diffusion model. prefix: what the names of its layers begin with.
    """

    def __init__(self, architecture: str, device_type: str, prefix: str = "") -> None:
        self.architecture, self.device_type, self.prefix = architecture, device_type, prefix
        self.patterns = SENSITIVE + SENSITIVE_IN.get(architecture, ())

    def __call__(self, module: torch.nn.Module, name: str, weight: torch.Tensor) -> int:
        """Choose linear layers of the repeated blocks, wide enough and not sensitive. weight: (out, in), as stored."""
        if not hasattr(module, "in_features") or weight.dim() != 2 or not weight.is_floating_point():
            return 0
        if min(weight.shape) < NARROWEST or weight.shape[0] % 8 or weight.shape[1] % 8:
            return 0
        return group_count(weight.shape[1], self.device_type) if self.covers(name) else 0

    def covers(self, name: str) -> bool:
        """Say whether a layer of that name stands rounding."""
        if not name.startswith(self.prefix):
            return False
        name = name[len(self.prefix) :]
        in_a_block = any(part.isdecimal() for part in name.split(".")[:-1])
        return in_a_block and not has_part(name, self.patterns)
