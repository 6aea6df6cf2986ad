"""Tells the engine which of ComfyUI's quantised embeddings are made of rows, and what looks rows up in them."""

from __future__ import annotations

import torch

from ...ops.lending.lookup import register_lookup
from ...ops.rows import register_by_rows

# One scale for all, or one for each row. Other layouts scale blocks, in an order of their own.
_LAYOUTS = ("TensorCoreFP8", "TensorWiseINT8")


def _has_rows(tensor: torch.Tensor) -> bool:
    if not str(getattr(tensor, "_layout_cls", "")).startswith(_LAYOUTS):
        return False
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = [getattr(tensor, name) for name in names]
    transposed = getattr(tensor._params, "transposed", False)  # type: ignore[attr-defined]
    return not transposed and all(part.numel() == 1 or part.shape[0] == tensor.shape[0] for part in parts)


def _install() -> None:
    register_by_rows(_has_rows)
    kitchen = torch.ops.comfy_kitchen
    if hasattr(kitchen, "dequantize_int8_embedding"):
        register_lookup(kitchen.dequantize_int8_embedding.default, tables=(0, 1), ids=2)


_install()  # once, as Python imports a module once
