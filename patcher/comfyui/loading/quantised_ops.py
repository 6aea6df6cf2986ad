"""Leaves the plain weights of a quantised file where they lie.

ComfyUI's ops for quantised files cast what is not quantised as they load it: a copy of each such weight in memory of
the process's own, made before anything has asked for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.ops
import torch

from ....ops.lending.layer import has_forward


@contextmanager
def cast_when_used(root: torch.nn.Module, tensors: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a state dict's plain weights are loaded in the dtype that they have.

    The dtype that they are to be cast to is noted for the engine. ComfyUI before 0.33 keeps it elsewhere, and casts.
    """
    changed = []
    for name, layer in root.named_modules():
        made = getattr(layer, "factory_kwargs", None)
        if not isinstance(layer, comfy.ops.CastWeightBiasOp) or not isinstance(made, dict) or "dtype" not in made:
            continue
        if not has_forward(layer):  # a bank of experts, which is read as a whole for each of them
            continue
        prefix = f"{name}." if name else ""
        weight = tensors.get(f"{prefix}weight")
        if f"{prefix}comfy_quant" in tensors or not torch.is_tensor(weight) or not weight.is_floating_point():
            continue
        changed.append((layer, made))
        layer.factory_kwargs = {**made, "dtype": weight.dtype}
    try:
        yield
    finally:
        for layer, made in changed:
            layer.factory_kwargs = made
            loaded = layer._parameters.get("weight")
            if loaded is not None and loaded.dtype != made["dtype"]:
                layer.weight_comfy_model_dtype = made["dtype"]
