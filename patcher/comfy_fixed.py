"""Parameters that the host's code reads outside of any forward: they are placed on the device once.

The core's op classes are called for every use of their weights. Other modules own a few small parameters (tokens, gates)
that any method may read. On a CPU these are read where they lie; on another device they must be there.
"""

from __future__ import annotations

import torch

from .dynamic import DynamicModel


def place_fixed(dynamic: DynamicModel) -> int:
    """Place the parameters of modules that are no op classes; returns their bytes, which `fixed_bytes` then counts.

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
    dynamic.fixed_bytes = placed
    return placed
