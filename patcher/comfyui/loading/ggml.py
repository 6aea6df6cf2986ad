"""Takes over models of ComfyUI-GGUF, and of packs made after it: their tensors of blocks and their op classes.

Those classes are known by what they are called and have. Nothing of such a pack is imported.
"""

from __future__ import annotations

from typing import Any

import torch

from ....ops.files.disk_map import SourceError
from ....ops.gguf.types import TYPES
from ....ops.gguf.weight import Form, GgufWeight

TENSOR, LAYER = "GGMLTensor", "GGMLLayer"


def _is_a(cls: type, name: str) -> bool:
    return any(base.__name__ == name for base in cls.__mro__)


def is_ggml(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is one of that pack's."""
    return _is_a(type(tensor), TENSOR)


def own_form(tensor: torch.Tensor, module: torch.nn.Module, computes_in: torch.dtype) -> torch.Tensor:
    """Return the weight of such a tensor as one of ours around the same memory.

    Its numbers are computed in the dtype in which the module computes them, so they have the same bits.
    computes_in: the dtype of the module's input. Raises SourceError for a type of blocks that is not known here.
    """
    raw, shape = tensor.as_subclass(torch.Tensor), tuple(tensor.shape)
    number = getattr(tensor, "tensor_type", None)
    kind = None if number is None else TYPES.get(int(number))
    if number is not None and kind is None:
        raise SourceError(
            f"a weight of GGUF type {number!r} is not known here. Known: "
            f"{', '.join(known.name for known in TYPES.values())}. Leave this model to its own loader."
        )
    if kind is None:
        return raw
    if kind.dtype is not None:
        wanted: torch.dtype = getattr(torch, kind.dtype)
        return (raw if raw.dtype == wanted else raw.contiguous().view(-1).view(wanted)).view(shape)
    chosen = getattr(module, "dequant_dtype", None)
    # By default that pack multiplies in the dtype of the blocks' own scales.
    work = torch.float16 if chosen is None else computes_in if chosen == "target" else chosen
    blocks = raw.contiguous().view(torch.uint8).view(-1, kind.nbytes)
    return GgufWeight(blocks, Form(kind.name, shape, work, work=work))


def comfyui_classes(model: torch.nn.Module) -> None:
    """Give modules of that pack the class of ComfyUI's that they were made of. It casts what ours are lent as."""
    for module in model.modules():
        if _is_a(type(module), LAYER):
            module.__class__ = next(cls for cls in type(module).__mro__ if cls.__module__ == "comfy.ops")


def compute_dtype(model: Any) -> torch.dtype:
    """Return the dtype that a diffusion model's layers get their input in; fp32 for others."""
    chosen = getattr(model, "manual_cast_dtype", None)
    if chosen is None and hasattr(model, "get_dtype"):
        chosen = model.get_dtype()
    return chosen or torch.float32
