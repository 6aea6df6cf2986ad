"""Makes op classes for ComfyUI's `model_options["custom_operations"]`: all that ComfyUI casts, with dynamic classes.

Without a bundle they do what ComfyUI's own classes do, so a model made with them is an ordinary one until a patcher
attaches.
"""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch

from ....ops.lending.layer import dynamic_class

_namespaces: dict[type, type] = {}


def operations(base: type = comfy.ops.manual_cast) -> type:
    """Make a namespace like `base` (Linear, Conv1d to 3d, ConvTranspose, norms, Embedding, ...) of dynamic classes."""
    namespace = _namespaces.get(base)
    if namespace is None:
        layers: dict[str, Any] = {}
        for name in dir(base):
            layer = getattr(base, name)
            if isinstance(layer, type) and issubclass(layer, torch.nn.Module):
                layers[name] = dynamic_class(layer)
        namespace = _namespaces[base] = type(f"Spillway{base.__name__}", (base,), layers)
    return namespace
