"""Parameters that the host's code reads outside of any forward: they are placed on the device once.

The core's op classes are called for every use of their weights. Other modules own a few small parameters (tokens,
gates) that any method may read. On a CPU these are read where they lie; on another device they must be there.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterable
from typing import Any

import torch

from ...dynamic_model import DynamicModel

# As the host's patchers keep them.
Backup = namedtuple("Backup", ["weight", "inplace_update"])


def place_permanently(dynamic: DynamicModel) -> int:
    """Place the parameters of modules that are no op classes; returns their bytes, which `permanent_bytes` then counts.

    Inside a forward they are lent like all others, so patches on them work.
    """
    if dynamic.backend.in_place:
        return 0
    placed = 0
    for bundle in dynamic.bundles:
        for param in bundle.params:
            if hasattr(param.owner, "comfy_cast_weights") or param.source.is_meta:
                continue
            value = param.source.to(device=dynamic.device, dtype=param.form.dtype)
            param.idle = torch.nn.Parameter(value, requires_grad=False)
            placed += value.numel() * value.element_size()
        bundle.restore()
    dynamic.permanent_bytes = placed
    return placed


# Modules of text and vision encoders whose weight is added without calling them.
NEVER_CALLED = ("position_embedding", "position_embeddings", "token_type_embeddings", "embed_positions")


def patch_idle_reads(dynamic: DynamicModel, changed: Iterable[str], backup: dict[str, Any]) -> None:
    """Patched weights that the host reads while they are idle are patched at once, and stand in the module.

    Those are weights that a patch gives another shape (Flux takes its number of channels from its first layer), and
    those of modules that are never called. `backup` gets what stood there.
    """
    for key in changed:
        bundle = dynamic.by_key.get(key)
        if bundle is None:
            continue
        param = next(param for param in bundle.params if param.key == key)
        if key in backup:
            param.idle = backup.pop(key).weight
        resized = param.form.shape != param.source.shape
        if param.patch is not None and (resized or key.split(".")[-2] in NEVER_CALLED):
            backup[key] = Backup(param.idle, False)
            weight = param.source.to(param.form.dtype, copy=True)
            param.idle = torch.nn.Parameter(param.patch(weight), requires_grad=False)
        bundle.restore()
