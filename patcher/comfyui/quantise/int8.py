"""Decides which layers of ComfyUI's diffusion models are kept in INT8, with which kernels, and whether that pays."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import torch

from ....ops.device.backend import backend_for
from ....ops.gather import is_wrapper, tensor_bytes
from ....ops.int8.measure import Timing, measure
from ...first_use.check import first_use
from ..first_use import record_file
from ..kitchen import register_kitchen
from ..patcher import DynamicModelPatcher
from .layers import OwnInt8Layers, layout_of

log = logging.getLogger("spillway")

INT8, INT8_AUTO = "int8", "int8_auto"
OWN_INT8 = INT8


def choose_int8(patcher: DynamicModelPatcher, wanted: str, leave_out: Sequence[str] = ()) -> str:
    """Have a freshly loaded patcher quantise its layers as they are loaded. Returns what was decided, in words.

    wanted: 'int8' does it always, 'int8_auto' where it is faster on the patcher's device. leave_out: more parts of
    layers' names that keep their dtype.
    """
    model, device = patcher.model, patcher.load_device
    root = model.diffusion_model
    layers = OwnInt8Layers(type(root).__name__, device.type, "diffusion_model.", leave_out)
    shapes: Counter[tuple[int, int]] = Counter()
    quantised = saved = 0
    for name, module in root.named_modules():
        weight = module._parameters.get("weight")
        form = None if weight is None else layers(module, f"diffusion_model.{name}", weight.detach())
        if weight is not None and form is not None:
            rows, columns = weight.shape
            shapes[rows, columns] += 1
            saved += tensor_bytes(weight.detach()) - rows * (columns + 4 * form.groups)
        elif is_wrapper(weight) and "INT8" in layout_of(weight):
            quantised += 1
    if not shapes:
        words = (
            f"the file's {quantised} INT8 layers are used as they are"
            if quantised
            else f"INT8 was asked for, but {type(root).__name__} has no layers for it: loaded as it is"
        )
        return noted(patcher, words, logging.INFO if quantised else logging.WARNING)
    register_kitchen()
    backend = backend_for(device)
    # Before the measurement, where wrong products could win.
    first_use(backend, record_file(), aimdo=False).distrust_products(backend.device)
    computes = model.manual_cast_dtype or model.get_dtype()
    timing: Timing = measure(shapes, computes, torch.device(device))
    count = f"{sum(shapes.values())} layers"
    if not timing.wins and wanted == INT8_AUTO:
        return noted(patcher, f"{count} keep their dtype: {timing.in_words()}")
    patcher.state.quantise = layers
    patcher.size = patcher.model_size() - saved  # the size that ComfyUI makes room for
    if timing.wins:
        return noted(patcher, f"{count} are quantised to INT8 as they are loaded: {timing.in_words()}")
    return noted(
        patcher,
        f"{count} are quantised to INT8, which is NOT faster here: {timing.in_words()}. It saves memory; for speed "
        "choose int8_auto or default",
        logging.WARNING,
    )


def noted(patcher: DynamicModelPatcher, words: str, level: int = logging.INFO) -> str:
    """Have a decision of the load in the ledger of the engine, which logs it."""
    patcher.state.notes.append((words, level))
    return words
