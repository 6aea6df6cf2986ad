"""The check of a device before its first model, in ComfyUI: where its result lies, and layers that multiply plainly."""

from __future__ import annotations

from pathlib import Path

import comfy.ops
import folder_paths
import torch

from ..first_use.verdict import FP8, INT8, Verdict


def record_file() -> Path:
    """Where the results lie. They are this machine's, so in ComfyUI's user folder."""
    return Path(folder_paths.get_user_directory()) / "__spillway" / "first_use.json"


def orders_file() -> Path:
    """Where it is kept in which order the layers of models ran."""
    return record_file().with_name("orders.json")


def multiplies_wrongly(module: torch.nn.Module, verdict: Verdict) -> bool:
    """Whether ComfyUI would compute this layer in a quantised product that is wrong on its device."""
    kind = str(getattr(module, "quant_format", None))
    in_fp8 = "float8" in kind or "fp8" in kind or isinstance(module, comfy.ops.fp8_ops.Linear)
    return (in_fp8 and not verdict.trusts(FP8)) or ("int8" in kind and not verdict.trusts(INT8))


def as_it_is(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight. Every layer of ComfyUI's whose weight has a function dequantises it and multiplies plainly."""
    return weight
