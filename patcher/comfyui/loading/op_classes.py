"""Op classes for the host's `model_options["custom_operations"]`: every layer kind that the core casts, born dynamic.

Without a bundle they are the core's own classes, so a model made with them is a plain one until a patcher attaches.
"""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch

from ....ops.lending.layer import dynamic_class

_namespaces: dict[type, type] = {}


def operations(base: type = comfy.ops.manual_cast) -> type:
    """A namespace like `base` (Linear, Conv1d to 3d, ConvTranspose, norms, Embedding, ...) with dynamic classes."""
    made = _namespaces.get(base)
    if made is None:
        layers: dict[str, Any] = {}
        for name in dir(base):
            layer = getattr(base, name)
            if isinstance(layer, type) and issubclass(layer, torch.nn.Module):
                layers[name] = dynamic_class(layer)
        made = _namespaces[base] = type(f"Spillway{base.__name__}", (base,), layers)
    return made
