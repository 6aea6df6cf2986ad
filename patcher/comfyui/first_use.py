"""The check of a device before its first model, in ComfyUI: where its result lies, and products without kernels."""

from __future__ import annotations

import types
from pathlib import Path

import comfy.ops
import folder_paths
import torch

from ...ops.overrides import SavedAttributes
from ..first_use.verdict import FP8, INT8, Verdict


def record_file() -> Path:
    """Where the results lie. They are this machine's, so in ComfyUI's user folder."""
    return Path(folder_paths.get_user_directory()) / "__spillway" / "first_use.json"


def multiply_plainly(model: torch.nn.Module, verdict: Verdict, attributes: SavedAttributes) -> int:
    """Have ComfyUI's quantised layers dequantise their weights where the device's products are wrong.

    attributes: puts the layers back as they were. Returns how many there are.
    """
    changed = 0
    for module in model.modules():
        if not verdict.trusts(FP8) and isinstance(module, comfy.ops.fp8_ops.Linear):
            plainly = types.MethodType(comfy.ops.manual_cast.Linear.forward_comfy_cast_weights, module)
            attributes.set(module, "forward_comfy_cast_weights", plainly)
            changed += 1
        kind = str(getattr(module, "quant_format", None))
        in_fp8, in_int8 = "float8" in kind or "fp8" in kind, "int8" in kind
        if (in_fp8 and not verdict.trusts(FP8)) or (in_int8 and not verdict.trusts(INT8)):
            attributes.set(module, "_full_precision_mm", True)
            changed += 1
    return changed
