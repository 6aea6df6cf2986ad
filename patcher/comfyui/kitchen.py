"""Has INT8 products on GPUs computed by comfy-kitchen, which ComfyUI brings."""

from __future__ import annotations

import functools

import torch
from comfy.quant_ops import QUANT_ALGOS

from ...ops.device.identity import installed
from ...ops.int8.linear import Kernel, register_kernel

_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Device types whose kernels in comfy-kitchen are more than torch's own operations.
_KITCHEN_BACKENDS = ("cuda", "triton", "hip")


@functools.cache
def register_kitchen() -> None:
    """Register comfy-kitchen's kernel where it has one for the device."""
    if "int8_tensorwise" not in QUANT_ALGOS:
        return
    import comfy_kitchen

    backends = comfy_kitchen.list_backends()
    for name in _KITCHEN_BACKENDS:
        backend = backends.get(name, {})
        usable = backend.get("available") and not backend.get("disabled")
        if usable and "int8_linear" in backend.get("capabilities", ()):
            register_kernel("cuda", _kitchen_linear, f"comfy-kitchen {installed('comfy-kitchen')}")


def _kitchen_linear(
    x: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    bias = bias if bias is None else bias.to(x.dtype)
    linear: Kernel = torch.ops.comfy_kitchen.int8_linear
    return linear(x.contiguous(), qdata, scale, bias, _CODES[x.dtype], False, 256)  # type: ignore[call-arg]
