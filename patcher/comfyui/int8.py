"""Decides which layers of ComfyUI's diffusion models are kept in INT8, with which kernels, and whether that pays."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch

from ...ops.device.backend import backend_for
from ...ops.gather import is_wrapper, tensor_bytes
from ...ops.gguf.weight import stays_quantised
from ...ops.int8.measure import Timing, measure
from ..first_use.check import first_use
from ..int8_layers import Int8Layers
from .first_use import record_file
from .kitchen import register_kitchen
from .patcher import DynamicModelPatcher

log = logging.getLogger("spillway")

INT8, INT8_AUTO = "int8", "int8_auto"


class ComfyInt8Layers(Int8Layers):
    """Chooses among ComfyUI's modules. Weights in fewer bits than INT8 stay; those in INT8 are taken over."""

    def __call__(self, module: torch.nn.Module, name: str, weight: torch.Tensor) -> int:
        if stays_quantised(weight):
            layout = str(getattr(weight, "_layout_cls", ""))
            if "INT8" in layout:
                parameters: Any = weight._params  # type: ignore[attr-defined]
                rotated = getattr(parameters, "convrot", False) or getattr(parameters, "transposed", False)
                # On a CPU comfy-kitchen copies the weight at every use. Elsewhere its own kernels are the best.
                return int(self.device_type == "cpu" and not rotated and weight.dim() == 2)
            if "FP8" not in layout:
                return 0
        return super().__call__(module, name, weight)


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
    backend = backend_for(device)
    # Before the measurement, where wrong products could win.
    first_use(backend, record_file(), aimdo=False).distrust_products(backend.device)
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
