"""Decides which layers of ComfyUI's diffusion models are kept in INT8, with which kernels, and whether that pays."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from comfy.quant_ops import QUANT_ALGOS

from ...ops.gather import is_wrapper, tensor_bytes
from ...ops.int8.linear import Kernel, register_kernel
from ...ops.int8.measure import Timing, measure
from ..int8_layers import Int8Layers
from .patcher import DynamicModelPatcher

log = logging.getLogger("spillway")

INT8, INT8_AUTO = "int8", "int8_auto"
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Device types whose kernels in comfy-kitchen are more than torch's own operations.
_KITCHEN_BACKENDS = ("cuda", "triton", "hip")


class ComfyInt8Layers(Int8Layers):
    """Chooses among ComfyUI's modules. Weights in fewer bits than INT8 stay; those in INT8 are taken over."""

    def __call__(self, module: torch.nn.Module, name: str, weight: torch.Tensor) -> int:
        if is_wrapper(weight):
            layout = str(getattr(weight, "_layout_cls", ""))
            if "INT8" in layout:
                parameters: Any = weight._params  # type: ignore[attr-defined]
                rotated = getattr(parameters, "convrot", False) or getattr(parameters, "transposed", False)
                # On a CPU comfy-kitchen copies the weight at every use. Elsewhere its own kernels are the best.
                return int(self.device_type == "cpu" and not rotated and weight.dim() == 2)
            if "FP8" not in layout:
                return 0
        return super().__call__(module, name, weight)


def register_kitchen() -> None:
    """Have INT8 products on GPUs computed by comfy-kitchen where it has a kernel for the device."""
    if "int8_tensorwise" not in QUANT_ALGOS:
        return
    import comfy_kitchen

    backends = comfy_kitchen.list_backends()
    for name in _KITCHEN_BACKENDS:
        backend = backends.get(name, {})
        usable = backend.get("available") and not backend.get("disabled")
        if usable and "int8_linear" in backend.get("capabilities", ()):
            register_kernel("cuda", _kitchen_linear, f"comfy-kitchen {importlib.metadata.version('comfy-kitchen')}")


def _kitchen_linear(
    x: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    bias = bias if bias is None else bias.to(x.dtype)
    linear: Kernel = torch.ops.comfy_kitchen.int8_linear
    return linear(x.contiguous(), qdata, scale, bias, _CODES[x.dtype], False, 256)  # type: ignore[call-arg]


def choose_int8(patcher: DynamicModelPatcher, wanted: str) -> str:
    """Have a freshly loaded patcher quantise its layers as they are loaded. Returns what was decided, in words.

    wanted: 'int8' does it always, 'int8_auto' where it is faster on the patcher's device.
    """
    model, device = patcher.model, patcher.load_device
    root = model.diffusion_model
    layers = ComfyInt8Layers(type(root).__name__, device.type, "diffusion_model.")
    shapes: Counter[tuple[int, int]] = Counter()
    quantised = saved = 0
    for name, module in root.named_modules():
        weight = module._parameters.get("weight")
        groups = 0 if weight is None else layers(module, f"diffusion_model.{name}", weight.detach())
        if weight is not None and groups:
            rows, columns = weight.shape
            shapes[rows, columns] += 1
            saved += tensor_bytes(weight.detach()) - rows * (columns + 4 * groups)
        elif is_wrapper(weight) and "INT8" in str(getattr(weight, "_layout_cls", "")):
            quantised += 1
    if not shapes:
        words = (
            f"the file's {quantised} INT8 layers are used as they are"
            if quantised
            else f"INT8 was asked for, but {type(root).__name__} has no layers for it: loaded as it is"
        )
        return _noted(patcher, words, logging.INFO if quantised else logging.WARNING)
    register_kitchen()
    computes = model.manual_cast_dtype or model.get_dtype()
    timing: Timing = measure(shapes, computes, torch.device(device))
    count = f"{sum(shapes.values())} layers"
    if not timing.wins and wanted == INT8_AUTO:
        return _noted(patcher, f"{count} keep their dtype: {timing.in_words()}")
    patcher.state.int8 = layers
    patcher.size = patcher.model_size() - saved  # the size that ComfyUI makes room for
    if timing.wins:
        return _noted(patcher, f"{count} are quantised to INT8 as they are loaded: {timing.in_words()}")
    return _noted(
        patcher,
        f"{count} are quantised to INT8, which is NOT faster here: {timing.in_words()}. It saves memory; for speed "
        "choose int8_auto or default",
        logging.WARNING,
    )


def _noted(patcher: DynamicModelPatcher, words: str, level: int = logging.INFO) -> str:
    patcher.state.notes.append((words, level))
    return words
