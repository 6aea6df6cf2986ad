"""Which layers of a diffusion model are kept in INT8.

What every token passes through once for each block carries nearly all of the arithmetic, and stands rounding.
Embeddings, modulation, norms and the first and last projections carry little, and every error of theirs goes
everywhere.
"""

from __future__ import annotations

import fnmatch

import torch

from ..ops.int8.linear import group_count

# Parts of a layer's name that keep their dtype in every architecture.
SENSITIVE = (
    "*emb*",
    "*norm*",
    "*mod",
    "mod",
    "*modulation*",
    "adaln*",
    "adaLN*",
    "time_*",
    "t_block",
    "img_in",
    "txt_in",
    "vector_in",
    "guidance_in",
    "final*",
    "head",
    "proj_in",
    "proj_out",
)
# What else does, by the class of the diffusion model.
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
# A narrower layer has nothing to gain.
NARROWEST = 64


class Int8Layers:
    """How many scales a row of a layer's weight has in INT8; 0 for layers that keep their dtype.

    architecture: the class name of the diffusion model. prefix: what the names of its layers begin with.
    """

    def __init__(self, architecture: str, device_type: str, prefix: str = "") -> None:
        self.architecture, self.device_type, self.prefix = architecture, device_type, prefix
        self.patterns = SENSITIVE + SENSITIVE_IN.get(architecture, ())

    def __call__(self, module: torch.nn.Module, name: str, weight: torch.Tensor) -> int:
        """weight: as stored. Linear layers of the repeated blocks, wide enough and not sensitive."""
        if not hasattr(module, "in_features") or weight.dim() != 2 or not weight.is_floating_point():
            return 0
        if min(weight.shape) < NARROWEST or weight.shape[0] % 8 or weight.shape[1] % 8:
            return 0
        return group_count(weight.shape[1], self.device_type) if self.covers(name) else 0

    def covers(self, name: str) -> bool:
        """Whether a layer of that name stands rounding."""
        if not name.startswith(self.prefix):
            return False
        parts = name[len(self.prefix) :].split(".")
        in_a_block = any(part.isdecimal() for part in parts[:-1])
        return in_a_block and not any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in self.patterns)
