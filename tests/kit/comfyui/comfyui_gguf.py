"""ComfyUI-GGUF itself, where $SPILLWAY_COMFYUI_GGUF names a checkout of it, and a stand-in for what its models are."""

import functools
import importlib.util
import os
import sys
import types
from pathlib import Path

import comfy.ops
import torch

from spillway.ops.gguf.dequantise import function_for
from spillway.ops.gguf.types import IDS, TYPES

VARIABLE = "SPILLWAY_COMFYUI_GGUF"


def missing():
    """Say in words why the pack cannot be loaded; '' where it can."""
    if not os.environ.get(VARIABLE):
        return f"{VARIABLE} names no checkout of ComfyUI-GGUF"
    found = importlib.util.find_spec("gguf")  # a folder of tests has that name too, without an origin
    return "" if found and found.origin else "ComfyUI's Python lacks the package 'gguf', which the pack needs"


@functools.cache
def pack():
    """Import the pack's nodes, as ComfyUI does."""
    folder = Path(os.environ[VARIABLE])
    package = types.ModuleType("comfyui_gguf")
    package.__path__ = [str(folder)]
    sys.modules["comfyui_gguf"] = package
    return importlib.import_module("comfyui_gguf.nodes")


class GGMLTensor(torch.Tensor):
    """Blocks that are called a weight: the class by which such models are known, and its attributes."""

    @staticmethod
    def __new__(cls, raw, tensor_type=None, tensor_shape=None):
        return torch.Tensor._make_subclass(cls, raw)

    def __init__(self, raw, tensor_type=None, tensor_shape=None):
        self.tensor_type, self.tensor_shape, self.patches = tensor_type, torch.Size(tensor_shape or raw.shape), []

    @property
    def shape(self):
        return self.tensor_shape

    def detach(self):
        return self

    def to(self, *args, **kwargs):
        return self


class GGMLLayer(torch.nn.Module):
    """Makes numbers where they are used, in fp16 unless told otherwise."""

    dequant_dtype = None


class Linear(GGMLLayer, comfy.ops.manual_cast.Linear):
    def forward(self, x):
        weight = self.weight
        kind = TYPES[int(weight.tensor_type)].name
        blocks = weight.as_subclass(torch.Tensor).to(x.device).view(-1, TYPES[IDS[kind]].nbytes)
        numbers = function_for(kind)(blocks, self.dequant_dtype or torch.float16).view(weight.shape)
        bias = None if self.bias is None else self.bias.to(x.device, x.dtype)
        return torch.nn.functional.linear(x, numbers.to(x.dtype), bias)


def stand_in(patcher, written):
    """Give linear layers of a loaded diffusion model the blocks of a file: {name: (kind, shape, blocks)}."""
    root = patcher.model.diffusion_model
    for name, module in root.named_modules():
        value = written.get(f"{name}.weight")
        if isinstance(module, torch.nn.Linear) and isinstance(value, tuple):
            kind, shape, blocks = value
            module.__class__ = Linear
            raw = blocks.view(shape[0], -1)
            module._parameters["weight"] = GGMLTensor(raw, IDS[kind], shape)
            module._parameters["weight"]._is_param = True
    return patcher
