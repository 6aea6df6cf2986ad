"""Checks the shapes of weights that ComfyUI's layers take unseen.

With dynamic VRAM on, ComfyUI makes its Linear and Embedding without a weight and gives them whatever the file has. A
weight of another shape would only be met in the first forward, by an error that names no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.memory_management
import comfy.ops
import torch

_OPS = comfy.ops.disable_weight_init
# Layers with a way to load of their own, quantised ones among them, have weights and look at them.
_TAKES_ANY = [getattr(kind, "_load_from_state_dict", None) for kind in (_OPS.Linear, _OPS.Embedding)]


def check_shapes(root: torch.nn.Module, tensors: Mapping[str, Any]) -> None:
    """Raise the RuntimeError that torch raises for a weight of another shape than its layer's."""
    if not getattr(comfy.memory_management, "aimdo_enabled", False):
        return  # torch looks itself
    wrong = []
    for name, layer in root.named_modules():
        key = f"{name}.weight" if name else "weight"
        if type(layer)._load_from_state_dict not in _TAKES_ANY or not torch.is_tensor(tensors.get(key)):
            continue
        weight = layer._parameters.get("weight")
        shape = (layer.out_features, layer.in_features) if weight is None else tuple(weight.shape)
        if tuple(tensors[key].shape) != shape:
            wrong.append(f"size mismatch for {key}: the file has {tuple(tensors[key].shape)}, the model {shape}")
    if wrong:
        raise RuntimeError("; ".join(wrong[:3]))
