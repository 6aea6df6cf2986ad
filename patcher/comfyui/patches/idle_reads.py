"""Places parameters for ComfyUI's code that reads them outside of any forward, while they are idle.

ComfyUI's op classes are called for every use of their weights. Other modules own a few small parameters (tokens, gates)
that any method may read. A CPU reads them where they lie. On another device they must be there, or an op would be given
tensors of two devices.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterable
from typing import Any

import torch

from ...dynamic_model import DynamicModel

# In the shape that ComfyUI's patchers keep.
Backup = namedtuple("Backup", ["weight", "inplace_update"])


def place_permanently(dynamic: DynamicModel) -> int:
    """Place the parameters of modules that are no op classes on the device; returns their bytes.

    `permanent_bytes` counts them. Inside a forward they are lent like all others, so patches on them work.
    """
    if dynamic.backend.in_place:
        return 0
    placed = 0
    for bundle in dynamic.bundles:
        for param in bundle.params:
            if hasattr(param.owner, "comfy_cast_weights") or param.source.is_meta:
                continue
            value = param.source.to(device=dynamic.device, dtype=param.final.dtype)
            param.idle = torch.nn.Parameter(value, requires_grad=False)
            placed += value.numel() * value.element_size()
        bundle.restore()
    dynamic.permanent_bytes = placed
    return placed


# Modules of text and vision encoders that are never called: their weight is added as it is.
NEVER_CALLED = ("position_embedding", "position_embeddings", "token_type_embeddings", "embed_positions")


def patch_idle_reads(dynamic: DynamicModel, changed: Iterable[str], backup: dict[str, Any]) -> None:
    """Patch weights that ComfyUI reads while they are idle, and leave them in their modules. `backup` gets the others.

    ComfyUI reads weights of modules that are never called, and the shape of weights that a patch resizes (Flux takes
    its number of channels from its first layer).
    """
    for key in changed:
        bundle = dynamic.by_key.get(key)
        if bundle is None:
            continue
        param = next(param for param in bundle.params if param.key == key)
        if key in backup:
            param.idle = backup.pop(key).weight
        resized = param.final.shape != param.source.shape
        if param.patch is not None and (resized or key.split(".")[-2] in NEVER_CALLED):
            backup[key] = Backup(param.idle, False)
            weight = param.source.to(param.final.dtype, copy=True)
            param.idle = torch.nn.Parameter(param.patch(weight), requires_grad=False)
        bundle.restore()
